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
