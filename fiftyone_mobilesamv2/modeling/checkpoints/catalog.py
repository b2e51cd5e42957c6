"""The catalog of models and weights files: every external fact, with its source.

A "read" date is the date of the stored copy of the owner's page that a fact comes from. None of the files could be
downloaded when this catalog was written. ``fiftyone-mobilesamv2 models --check-sources`` queries the hosts themselves.

``tools/write_generated.py`` generates ``manifest.json`` and the README's table of models from this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Apache-2.0: MobileSAM (LICENSE of github.com/ChaoningZhang/MobileSAM), SAM (LICENSE of
# github.com/facebookresearch/segment-anything), EfficientViT-SAM (huggingface.co/mit-han-lab/efficientvit-sam,
# "License: apache-2.0", read 2026-11-29). AGPL-3.0: ultralytics, whose modules run them and trained the detector
# (LICENSE of github.com/ultralytics/ultralytics). Spelled as FiftyOne does.
LICENSES = "Apache 2.0,AGPL-3.0"


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub.

    Attributes:
        revision: a full commit hash, which pins the file, or a branch if the commit is not known.
    """

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True)
class Weights:
    """A weights file.

    Attributes:
        filename: its name in the weights folder.
        sources: hub files and URLs to download it from, tried in this order.
        megabytes: its approximate size.
        size: its exact size in bytes, if known.
        sha256: its hash, if known.
        git_blob: its git blob id, if known: the SHA-1 of b"blob <size>\\0" + content, which pins the file as well.
        old_names: other names under which it was published or is often stored; such a file is used if its hash matches.
        folder: the folder of the trained model that it belongs to; None for a file of the catalog.
    """

    filename: str
    sources: tuple[HubFile | str, ...]
    megabytes: int
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    old_names: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def is_packaged(self) -> bool:
        """Whether the file is part of the package."""
        return not self.sources and self.folder is None

    def describe(self) -> str:
        """Describes the expected file, for error messages.

        >>> Weights("w.pt", (), megabytes=2, size=2_000_123).describe()
        '2,000,123 bytes'
        """
        facts = [f"{self.size:,} bytes" if self.size else f"about {self.megabytes} MB"]
        if self.sha256:
            facts.append(f"sha256 {self.sha256}")
        if self.git_blob:
            facts.append(f"git blob {self.git_blob}")
        return ", ".join(facts)


@dataclass(frozen=True)
class PretrainedModel:
    """A model: an encoder from the registry, its weights files and its descriptions.

    Attributes:
        encoder: name in the encoder registry.
        encoder_weights, decoder_weights, detector_weights: its files; one file may hold several parts.
        description: which encoder it uses, for the zoo's page and the README.
        hint: how fast and accurate it is, in a few words, for selection lists.
        detector_size: long side, in pixels, to which images are resized for the detector.
        images: the kind of images that the doctor checks it on: "photos", or the package's "scenes".
        known_iou, known_fingerprint: what the doctor measures on a working model, if that has been measured.
        author: its author, as shown in the zoo.
        licenses: of its weights and of the code that runs them, as FiftyOne spells them.
        training_data: (name, URL) of its training set.
    """

    encoder: str
    encoder_weights: Weights
    decoder_weights: Weights
    detector_weights: Weights
    description: str
    hint: str
    # `--imgsz` of the release's Inference.py (as in github.com/RogerQi/MobileSAMV2, read 2026-11-29).
    detector_size: int = 1024
    images: str = "photos"
    known_iou: float | None = None
    known_fingerprint: tuple[float, ...] | None = None
    author: str = "Chaoning Zhang, et al."
    licenses: str = LICENSES
    training_data: tuple[str, str | None] = ("SA-1B", "https://segment-anything.com/dataset/index.html")

    @property
    def weights(self) -> dict[str, Weights]:
        """The files, by the name of the argument that takes their path."""
        return {
            "encoder_checkpoint": self.encoder_weights,
            "decoder_checkpoint": self.decoder_weights,
            "detector_checkpoint": self.detector_weights,
        }


# Hosts ---------------------------------------------------------------------------------------------------------------

# Weights are downloaded over https and only from these hosts, those of the sources below. The hub redirects to its own
# hosts, such as cdn-lfs.huggingface.co, cdn-lfs-us-1.hf.co and cas-bridge.xethub.hf.co.
HOSTS = re.compile(r"raw\.githubusercontent\.com|dl\.fbaipublicfiles\.com|([\w.-]+\.)?(huggingface\.co|hf\.co)")

# The released code, github.com/ChaoningZhang/MobileSAM. A file at a commit is content-addressed.
_RELEASE = "34bbbfdface3c18e5221aa7de6032d7220c6c6a1"
_RELEASE_URL = f"https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/{_RELEASE}"
# Meta's release, github.com/facebookresearch/segment-anything, README.md, "Model Checkpoints".
_META_URL = "https://dl.fbaipublicfiles.com/segment_anything"

SOURCE_URL = "https://github.com/ChaoningZhang/MobileSAM"

# Files ---------------------------------------------------------------------------------------------------------------

# MobileSAM v1, a whole SAM. Size and sha256: the pointer in
# huggingface.co/iulia-elisa/XAMI-model/commit/a82e1f78411fa0ee9ee18befa1c9af36dc828493 and the checksums of
# github.com/computational-cell-analytics/micro-sam (micro_sam/util.py), read 2026-11-29. Git blob: the release's tree.
# The hub's commit: huggingface.co/dhkim2810/MobileSAM/commits/87955d8f45ddcaa0212ca6ebcd13785902988e2a.
MOBILE_SAM = Weights(
    "mobile_sam.pt",
    (
        f"{_RELEASE_URL}/weights/mobile_sam.pt",
        HubFile("dhkim2810/MobileSAM", "mobile_sam.pt", "87955d8f45ddcaa0212ca6ebcd13785902988e2a"),
    ),
    megabytes=41,
    size=40_728_226,
    sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    git_blob="7ef2d090979fd9853adf17b7a99c8b94a1c5a6a7",
    old_names=("mobile_sam.pth",),  # its name in huggingface.co/ybelkada/segment-anything
)
# The release's prompt encoder and mask decoder. Git blob: the release's tree. The second source is the one that
# github.com/RogerQi/MobileSAMV2 (hubconf.py, read 2026-11-29) downloads; its hash and commit are unknown.
PROMPT_GUIDED_DECODER = Weights(
    "Prompt_guided_Mask_Decoder.pt",
    (
        f"{_RELEASE_URL}/MobileSAMv2/PromptGuidedDecoder/Prompt_guided_Mask_Decoder.pt",
        HubFile("RogerQi/MobileSAMV2", "Prompt_guided_Mask_Decoder.pt"),
    ),
    megabytes=15,
    git_blob="c13b15a3a4496dbcba5f4f0d3e8453f41d818420",
)
# Sha256: huggingface.co/yuwendu/MobileSAM_utils/blob/main/weight/ObjectAwareModel.pt, read 2026-11-29 ("140 MB"; its
# commit begins with 9e9d9cf). Whether the file in RogerQi/MobileSAMV2 (hubconf.py) is the same is unknown.
OBJECT_AWARE_MODEL = Weights(
    "ObjectAwareModel.pt",
    (
        HubFile("yuwendu/MobileSAM_utils", "weight/ObjectAwareModel.pt"),
        HubFile("RogerQi/MobileSAMV2", "ObjectAwareModel.pt"),
    ),
    megabytes=140,
    sha256="4d99244a9c7a4d7330af28d1801ebee362fa469ac564b57c8eab48b43e4e64a1",
)

# EfficientViT-SAM's encoders as distilled from ViT-H's embedding, so that ViT-H's decoder works with them. The files of
# the same names in that repository's root were trained further, together with their own decoders. Hashes:
# huggingface.co/mit-han-lab/efficientvit-sam/blob/<revision>/distilled_model/<file>, read 2026-11-29. Renamed from
# l0.pt, l1.pt and l2.pt on 2024-10-14 (commits 2a27427, a4b470d, a27558d).
_DISTILLED = ("mit-han-lab/efficientvit-sam", "a4a9bc05287666e5708655d8f100b11520a52178")


def _distilled(name: str, megabytes: int, sha256: str, size: int | None = None, *others: HubFile) -> Weights:
    repo, revision = _DISTILLED
    filename = f"efficientvit_sam_{name}.pt"
    sources = (HubFile(repo, f"distilled_model/{filename}", revision), *others)
    return Weights(filename, sources, megabytes, size, sha256, old_names=(f"{name}.pt",))


EFFICIENTVIT_L0 = _distilled("l0", 139, "3450127f9080533be10bb5133abf508510120814fedc8d2069cb27e0721c9a6f")
EFFICIENTVIT_L1 = _distilled("l1", 191, "0c24dbea505ce6d786b503750093b71d9f35b520aa5bd1f967e9dd81e968fd20")
# The l2.pt that existed when MobileSAMv2 was released, with its size: the pointer in
# huggingface.co/mit-han-lab/efficientvit-sam/commit/a71dfa37234faad827e57104814366e4f60fa854, read 2026-11-29.
# The last source is the one that hubconf.py of github.com/RogerQi/MobileSAMV2 downloads; its hash is unknown.
EFFICIENTVIT_L2 = _distilled(
    "l2",
    246,
    "f087f8287d5b3791020be8b0346a35dae0849dd191bf165178bf947e0df868cc",
    245_724_244,
    HubFile("RogerQi/MobileSAMV2", "l2.pt"),
)

# Meta's SAMs, each complete. The digits in their names are the first of their md5. Sizes and sha256: the pointers in
# huggingface.co/mashb1t/misc/commit/78e181357bf2e286bf2e76635c0b5cd89583c5d9 and
# huggingface.co/sam-hq-team/sam-hq-training/commit/d401202bc7a12ffcf56557bd3f2c38d1a154f4e8, which agree; sha256 also
# in the checksums of micro-sam (micro_sam/util.py), which downloads from Meta; all read 2026-11-29. The mirror:
# huggingface.co/ybelkada/segment-anything/tree/7790786db131bcdc639f24a915d9f2c331d843ee/checkpoints, read 2026-11-29.
_META_MIRROR = ("ybelkada/segment-anything", "7790786db131bcdc639f24a915d9f2c331d843ee")


def _meta_sam(name: str, md5_digits: str, size: int, sha256: str) -> Weights:
    repo, revision = _META_MIRROR
    filename = f"sam_{name}_{md5_digits}.pth"
    sources = (f"{_META_URL}/{filename}", HubFile(repo, f"checkpoints/{filename}", revision))
    return Weights(filename, sources, round(size / 1e6), size, sha256, old_names=(f"sam_{name}.pt", f"sam_{name}.pth"))


SAM_VIT_B = _meta_sam(
    "vit_b", "01ec64", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
)
SAM_VIT_L = _meta_sam(
    "vit_l", "0b3195", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
)
# The release's own sam_vit_h.pt holds only this encoder's tensors; its hash is unknown.
SAM_VIT_H = _meta_sam(
    "vit_h", "4b8939", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
)

# Trained for this package: on photos (training/photo_model.py), and on scenes (training/demo.py).
NANO_SAM = Weights("nano_sam.safetensors", (), megabytes=9)
NANO_DETECTOR = Weights("nano_detector.safetensors", (), megabytes=2)
DEMO_SAM = Weights("demo_sam.safetensors", (), megabytes=12)
DEMO_DETECTOR = Weights("demo_detector.safetensors", (), megabytes=6)

# Models --------------------------------------------------------------------------------------------------------------

PHOTO_MODEL = "mobilesamv2-nano-torch"
DEMO_MODEL = "mobilesamv2-demo-torch"


def _released(
    encoder: str, encoder_weights: Weights, decoder_weights: Weights, description: str, hint: str
) -> PretrainedModel:
    return PretrainedModel(encoder, encoder_weights, decoder_weights, OBJECT_AWARE_MODEL, description, hint)


# Decoders: the prompt-guided one works on ViT-H's embedding space, so it suits ViT-H and the encoders distilled from it
# (TinyViT, the distilled EfficientViTs), which are all that the release offers. ViT-B and ViT-L were trained together
# with their own decoders, which are in the same files.
# Hints: the paper (arXiv 2312.09579) times TinyViT, EfficientViT-L2 (about 20 ms) and ViT-H (over 400 ms, the most
# accurate); the others are ranked in between by size.
MODELS: dict[str, PretrainedModel] = {
    "mobilesamv2-tinyvit-torch": _released(
        "tiny_vit",
        MOBILE_SAM,
        PROMPT_GUIDED_DECODER,
        "TinyViT (MobileSAM), the smallest and fastest of the released encoders",
        "fastest",
    ),
    "mobilesamv2-efficientvit-l0-torch": _released(
        "efficientvit_l0", EFFICIENTVIT_L0, PROMPT_GUIDED_DECODER, "EfficientViT-L0 (EfficientViT-SAM)", "fast"
    ),
    "mobilesamv2-efficientvit-l1-torch": _released(
        "efficientvit_l1", EFFICIENTVIT_L1, PROMPT_GUIDED_DECODER, "EfficientViT-L1 (EfficientViT-SAM)", "fast"
    ),
    "mobilesamv2-efficientvit-l2-torch": _released(
        "efficientvit_l2",
        EFFICIENTVIT_L2,
        PROMPT_GUIDED_DECODER,
        "EfficientViT-L2 (EfficientViT-SAM), between TinyViT and ViT-H in speed and accuracy",
        "fast, more accurate",
    ),
    "mobilesamv2-vitb-torch": _released(
        "sam_vit_b", SAM_VIT_B, SAM_VIT_B, "SAM's ViT-B, with its own mask decoder", "slow"
    ),
    "mobilesamv2-vitl-torch": _released(
        "sam_vit_l", SAM_VIT_L, SAM_VIT_L, "SAM's ViT-L, with its own mask decoder", "slower"
    ),
    "mobilesamv2-vith-torch": _released(
        "sam_vit_h",
        SAM_VIT_H,
        PROMPT_GUIDED_DECODER,
        "SAM's ViT-H, the most accurate and slowest",
        "slowest, most accurate",
    ),
    PHOTO_MODEL: PretrainedModel(
        "efficientnet_lite0",
        NANO_SAM,
        NANO_SAM,
        NANO_DETECTOR,
        "EfficientNet-Lite0, which also finds the objects; small, and trained on 1,816 photos only",
        "small; part of the package",
        images="scenes",  # of the photos' objects, which are hard ones, it finds few
        # Measured by `fiftyone-mobilesamv2 doctor` on a CPU, float32, 2026-11-30.
        known_iou=0.668,
        known_fingerprint=(0.8527, -0.5043, -0.4293, -0.0827, -0.1508, -0.2294, 0.2061, -0.7363),
        author="The fiftyone_mobilesamv2 authors",
        training_data=("1,816 photos (COCO, Building Facade Segmentation, Clothing Co-Parsing), scenes", None),
        licenses="CC BY-NC 4.0,AGPL-3.0",
    ),
    DEMO_MODEL: PretrainedModel(
        "resnet_demo",
        DEMO_SAM,
        DEMO_SAM,
        DEMO_DETECTOR,
        "a small ResNet, trained only on synthetic scenes: for demos and tests, not for photos",
        "tiny, for demos and tests, not for photos",
        detector_size=320,  # as trained (training/detector.py)
        images="scenes",
        # Measured by `fiftyone-mobilesamv2 doctor` on a CPU, float32, 2026-11-29; bfloat16 differs by at most 0.002.
        known_iou=0.672,
        known_fingerprint=(0.4225, 0.7295, -0.8684, 0.5332, 0.5936, -0.5359, 0.3688, -1.2985),
        author="The fiftyone_mobilesamv2 authors",
        training_data=("procedural scenes", None),
    ),
}
