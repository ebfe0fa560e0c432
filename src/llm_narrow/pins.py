"""The pinned packages that the domain `python` is read from, and the part that each goes to.

To move a pin, download the wheel, put its SHA-256 here, and measure again: every figure changes.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from .packages import Package

Part = Literal["train", "calibration", "held_out"]
PARTS: tuple[Part, ...] = get_args(Part)

# Pins: "name version" -> SHA-256 of the wheel. Whole projects go to a part, so that nothing of a
# held-out project is ever narrowed on; the calibration part is diverse, for scores and refit.
PINS: Mapping[Part, Mapping[str, str]] = {
    "train": {
        "django 5.2.19": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "matplotlib 3.11.2": "07d9b9fa60cd4c393692f50d0bb03123242ddf61c99bb0e95e75feb354e7c1a8",
        "networkx 3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "pandas 3.1.1": "4f1602f614bb83f443381dbcbb94c4ac764b2e50c8d6c965614c5cd83e328c47",
        "scikit-learn 1.9.1": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "sympy 1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    },
    "calibration": {
        "dask 2026.8.0": "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
        "fonttools 4.68.0": "4b9c89b5876f1a74b1341632dfaf4c4c2be565d76c060445df401ebe7a4ceefa",
        "nltk 3.10.4": "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
        "sqlalchemy 2.1.9": "3a24b459e52b3ac138f6a05e99a4bd0589443a1ae18041a59c1cfdee12134a2b",
        "statsmodels 0.15.0": "b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da",
        "twisted 26.10.0": "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    },
    "held_out": {
        "aiohttp 3.14.5": "50a195903119008fe9cc68710535eb37f556ffffd6a7759afe70a2c145587045",
        "celery 5.7.0": "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e",
        "ipython 9.18.1": "997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5",
        "pymc 5.28.5": "29f44aa3edd727b29eb0a555eec0d9def4775a5d5c849eee31239384a5feaec2",
        "scrapy 2.19.0": "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
        "sphinx 9.0.4": "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
        "tornado 6.6.1": "1b6ff57cc69b339f8feb9e7b567b0e0eacb16bfaf234159496623ef7a67ba640",
        "xarray 2026.9.0": "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
    },
}
_GLIBC_2_17 = "manylinux2014_x86_64.manylinux_2_17_x86_64"
_WHEEL_TAGS = {
    "aiohttp": f"cp311-cp311-{_GLIBC_2_17}.manylinux_2_28_x86_64",
    "fonttools": f"cp311-cp311-{_GLIBC_2_17}",
    "matplotlib": f"cp311-cp311-{_GLIBC_2_17}",
    "pandas": "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64",
    "scikit-learn": "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64",
    "sqlalchemy": f"cp311-cp311-{_GLIBC_2_17}.manylinux_2_28_x86_64",
    "statsmodels": "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64",
    "tornado": "cp311-abi3-manylinux1_x86_64.manylinux_2_28_x86_64.manylinux_2_5_x86_64",
}


def pinned_packages() -> dict[Part, list[Package]]:
    """The wheels that the domain `python` is read from."""

    def package(pin: str, sha256: str) -> Package:
        name, version = pin.split()
        tag = _WHEEL_TAGS.get(name, "py3-none-any")
        return Package(name, version, f"{name.replace('-', '_')}-{version}-{tag}.whl", sha256)

    return {part: [package(*pin) for pin in pins.items()] for part, pins in PINS.items()}
