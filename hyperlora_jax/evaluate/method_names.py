"""Methods of the comparison as readers see them: titles, order in tables, which are controls."""

TITLES = {
    "reference": "reference",
    "exact": "exact answer",
    "generated": "generated LoRA",
    "conventional": "conventional LoRA",
    "base": "base, no LoRA",
    "shuffled": "shuffled reference",
    "mean_lora": "mean LoRA",
    "nearest": "nearest LoRA",
    "copy_reference": "copied reference",
    "refined": "refined LoRA",
    "refined_25": "refined, 25 steps",
    "paper": "paper’s recipe",
    "conventional_1": "conventional, 1 picture",
    "linear_combination": "mixed training LoRAs",
    "ridge": "ridge regression",
    "knn": "nearest 20 LoRAs",
    "noisy_copy": "noisy copy of the nearest",
    "pca_gaussian": "random sample (PCA)",
}

ORDER = (
    "exact",
    "conventional",
    "refined_25",
    "refined",
    "generated",
    "paper",
    "conventional_1",
    "linear_combination",
    "ridge",
    "knn",
    "nearest",
    "noisy_copy",
    "pca_gaussian",
    "mean_lora",
    "shuffled",
    "base",
    "copy_reference",
)
CONTROLS = (
    "base", "mean_lora", "shuffled", "nearest", "knn", "ridge", "pca_gaussian", "noisy_copy",
    "conventional_1",
)  # fmt: skip

# What a reader must know of a method to read the pictures.
MEANINGS = {
    "exact": "what a perfect model would draw",
    "generated": "written by the hypernetwork in one pass, from the reference alone",
    "conventional": "fitted step by step to several pictures of the subject, as LoRAs usually are",
    "conventional_1": "fitted in the same way to the reference alone",
    "base": "the base model as it is",
    "shuffled": "written by the hypernetwork from somebody else’s reference",
    "mean_lora": "the average of all training LoRAs, the same for everybody",
    "nearest": "the training LoRA of the subject who looks most alike",
    "copy_reference": "the reference itself instead of a drawing",
}


def meaning(name: str) -> str:
    """MEANINGS, of refined LoRAs too; "" where there is nothing to say."""
    if name.startswith("refined"):
        return "the generated LoRA after a few steps on the pictures that were shown of the subject"
    return MEANINGS.get(name, "")
