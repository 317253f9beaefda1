"""The table of avatar styles: identity parts, view parts, captions, what is held out.

Data only; `avatar_styles` resolves and explains it.
"""

NAMED_COLORS = {
    "red": "#d64545",
    "blue": "#4a7fd6",
    "green": "#4fb36a",
    "yellow": "#f0cf57",
    "purple": "#9560c9",
    "white": "#ffffff",
    "gray": "#9aa0a6",
    "orange": "#ee8f3c",
    "pink": "#f2a3c0",
    "teal": "#3fb5ad",
}
CLOTHING_COLORS = {
    "red": "#c62828",
    "blue": "#2459c4",
    "green": "#2e8b3d",
    "yellow": "#f5d423",
    "purple": "#7b3fb5",
    "black": "#22222a",
    "orange": "#f07818",
    "teal": "#1fa79c",
}

# Per style: `identity`/`view` map a part's name to its classes: {class: variant}, a colour table,
# "all" (every variant or value of the style), and (probability of absence, classes).
# pixel-art's subsets are those whose renders differ by the most native 16x16 pixels: every pair of
# mouths by >= 3, eyes by >= 7, glasses by >= 14, clothes by >= 10.
TABLE: dict[str, dict] = {
    "pixel-art": {
        "size": 16,
        "identity": {"hair": "all", "hairColor": "all", "skinColor": "all", "beard": (0.6, "all")},
        "view": {
            "mouth": {
                "open": "happy01",
                "lefty": "happy03",
                "righty": "happy04",
                "kissing": "happy05",
                "smiling": "happy09",
                "toothy": "happy12",
                "frowning": "sad01",
                "flat": "sad06",
            },
            "eyes": {
                "sly": "variant02",
                "keen": "variant03",
                "soft": "variant05",
                "tilted": "variant07",
                "wide": "variant09",
                "tired": "variant12",
            },
            "glasses": (
                0.6,
                {
                    "half": "dark01",
                    "tinted": "dark04",
                    "heavy": "dark06",
                    "narrow": "light03",
                    "frameless": "light04",
                    "round": "light07",
                },
            ),
            "clothingColor": CLOTHING_COLORS,
            "clothes": {
                "dotted": "variant02",
                "plain": "variant03",
                "checked": "variant06",
                "strappy": "variant09",
                "pocketed": "variant10",
                "striped": "variant13",
                "buttoned": "variant16",
                "lacy": "variant18",
                "short": "variant20",
                "draped": "variant21",
            },
        },
        "caption": "{mouth} mouth {eyes} eyes {glasses} glasses "
        "{clothingColor} {clothes} clothes {background} background",
        "reserved": (("hair", "hairColor"), ("mouth", "clothes", "clothingColor")),
        "fixed": {"eyesColor": "#34506b", "mouthColor": "#d0211c", "glassesColor": "#191919"},
        "grid": True,
    },
    "open-peeps": {
        "identity": {
            "head": "all",
            "headContrastColor": "all",
            "skinColor": "all",
            "facialHair": (0.7, "all"),
        },
        "view": {
            "expression": "all",
            "accessories": (0.5, "all"),
            "clothingColor": CLOTHING_COLORS,
        },
        "caption": "{expression} face {accessories} accessory "
        "{clothingColor} clothes {background} background",
        "reserved": (("head", "headContrastColor"), ("expression", "accessories", "clothingColor")),
    },
    "lorelei": {
        "identity": {
            "hair": "all",
            "nose": "all",
            "head": "all",
            "beard": (0.7, "all"),
            "freckles": (0.7, "all"),
        },
        "view": {"mouth": "all", "eyes": "all", "eyebrows": "all", "glasses": (0.6, "all")},
        "caption": "{mouth} mouth {eyes} eyes {eyebrows} brows {glasses} glasses "
        "{background} background",
        "reserved": (("hair", "nose"), ("mouth", "eyes")),
    },
    "notionists": {
        "identity": {"hair": "all", "nose": "all", "beard": (0.6, "all")},
        "view": {
            "mouth": "all",
            "eyes": "all",
            "eyebrows": "all",
            "glasses": (0.6, "all"),
            "clothes": "all",
        },
        "caption": "{mouth} mouth {eyes} eyes {eyebrows} brows {glasses} glasses "
        "{clothes} clothes {background} background",
        "reserved": (("hair", "nose"), ("mouth", "clothes")),
    },
    "voxel-art": {
        "identity": {
            "top": (0.04, "all"),
            "hairColor": "all",
            "skinColor": "all",
            "hatColor": "all",
            "nose": "all",
            "beard": (0.7, "all"),
        },
        "view": {
            "mouth": "all",
            "eyes": "all",
            "glasses": (0.6, "all"),
            "shirtColor": CLOTHING_COLORS,
            "outfit": "all",
        },
        "caption": "{mouth} mouth {eyes} eyes {glasses} glasses "
        "{shirtColor} {outfit} outfit {background} background",
        "reserved": (("top", "hairColor"), ("mouth", "outfit", "shirtColor")),
        "fixed": {"animationVariant": "none"},
    },
    "toon-head": {
        "identity": {
            "hair": "all",
            "rearHair": (0.35, "all"),
            "hairColor": "all",
            "skinColor": "all",
            "beard": (0.5, "all"),
        },
        "view": {
            "mouth": "all",
            "eyes": "all",
            "eyebrows": "all",
            "clothesColor": CLOTHING_COLORS,
            "clothes": "all",
        },
        "caption": "{mouth} mouth {eyes} eyes {eyebrows} brows "
        "{clothesColor} {clothes} clothes {background} background",
        "reserved": (("hair", "rearHair", "hairColor"), ("mouth", "clothes", "clothesColor")),
    },
    "micah": {
        "identity": {
            "hair": "all",
            "hairColor": "all",
            "baseColor": "all",
            "nose": "all",
            "ears": "all",
            "facialHair": (0.6, "all"),
        },
        "view": {
            "mouth": "all",
            "eyes": "all",
            "eyebrows": "all",
            "glasses": (0.5, "all"),
            "shirtColor": CLOTHING_COLORS,
            "clothes": "all",
        },
        "caption": "{mouth} mouth {eyes} eyes {eyebrows} brows {glasses} glasses "
        "{shirtColor} {clothes} clothes {background} background",
        "reserved": (("hair", "hairColor"), ("mouth", "clothes", "shirtColor")),
        "linked": {"facialHairColor": "hairColor"},
        "fixed": {"glassesColor": "#000000"},
    },
    "adventurer": {
        "identity": {
            "hair": "all",
            "hairColor": "all",
            "skinColor": "all",
            "details": (0.6, "all"),
        },
        "view": {"mouth": "all", "eyes": "all", "eyebrows": "all", "glasses": (0.6, "all")},
        "caption": "{mouth} mouth {eyes} eyes {eyebrows} brows {glasses} glasses "
        "{background} background",
        "reserved": (("hair", "hairColor"), ("mouth", "eyes")),
    },
    "big-ears": {
        "identity": {
            "hair": "all",
            "hairColor": "all",
            "skinColor": "all",
            "frontHair": "all",
            "nose": "all",
        },
        "view": {"mouth": "all", "eyes": "all"},
        "caption": "{mouth} mouth {eyes} eyes {background} background",
        "reserved": (("hair", "hairColor"), ("mouth", "eyes")),
    },
    "personas": {
        "identity": {
            "hair": "all",
            "hairColor": "all",
            "skinColor": "all",
            "nose": "all",
            "facialHair": (0.6, "all"),
        },
        "view": {
            "mouth": "all",
            "eyes": "all",
            "clothingColor": CLOTHING_COLORS,
            "clothes": "all",
        },
        "caption": "{mouth} mouth {eyes} eyes {clothingColor} {clothes} clothes "
        "{background} background",
        "reserved": (("hair", "hairColor"), ("mouth", "clothes", "clothingColor")),
        "linked": {"facialHairColor": "hairColor"},
    },
}
