"""Write the card of an exported data set from its rows, their sources and the measured leak."""

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import datasets
from huggingface_hub import DatasetCardData
from jinja2 import Environment, StrictUndefined

from plum_partonomy.hub.shards import CHECKSUMS_FILE
from plum_partonomy.records import QUESTION_TYPES
from plum_partonomy.scoring.blind_baselines import Leak
from plum_partonomy.sources.splits import DRAWN_SPLITS, PUBLISHED_PARTS
from plum_partonomy.sources.statistics import Statistics

MAX_LITERAL = 200
"""Maximum number of characters of a foreign text on a card."""

SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


class Provenance(NamedTuple):
    title: str
    origin: str
    """The origin of the images and the masks."""


PROVENANCE = {
    "mini": Provenance(
        "PARTONOMY mini",
        "Drawn by code, 128 x 128 pixels, without collected or annotated data: 12 kinds of object in 4 families with "
        "51 part names, many of them shared. Every object has one or two parts that are always drawn and six that are "
        "drawn in about half of the images. Pose, colours, background and a small occluder are random; masks are "
        "exact. In `mini` a mask covers all instances of a part. In `mini_instances` each instance has its own span "
        "and mask, in random order, so that only the earlier masks determine which one is meant. Results on these "
        "drawings do not predict results on photographs.",
    ),
    "mini_hard": Provenance(
        "PARTONOMY mini_hard",
        "`mini_hard`: drawn by code, 256 x 256 pixels: 24 kinds of object with 122 part names, a second object in the "
        "image, hidden and rare parts.",
    ),
    "core": Provenance(
        "Partonomy-Core",
        "Images, part masks and questions of the authors' release of Partonomy-Core (arXiv 2505.20759). The choices "
        "of each question are shuffled, and masks that differ in size from their image are resized.",
    ),
    "own_parts": Provenance(
        "PARTONOMY from own photographs",
        "Photographs and part masks of the folder's owner, who may describe them here.",
    ),
    "descriptor": Provenance(
        "PARTONOMY from a descriptor",
        "Images and part masks of the data set named in `source`, annotated by its authors.",
    ),
    "pascal_part": Provenance(
        "PARTONOMY Pascal-Part",
        "Photographs of PASCAL VOC 2010; part masks of Pascal-Part (Chen et al., CVPR 2014, arXiv 1406.2031), drawn "
        "by its annotators, in the COCO form of VLPart (Sun et al., arXiv 2305.11173).",
    ),
    "paco_lvis": Provenance(
        "PARTONOMY PACO-LVIS",
        "Photographs of COCO 2017; object and part masks of PACO-LVIS v1 (Ramanathan et al., CVPR 2023, arXiv "
        "2301.01795), drawn by its annotators. If an image shows several objects of a kind, a red box marks the one "
        "in question.",
    ),
    "partimagenet": Provenance(
        "PARTONOMY PartImageNet",
        "Photographs of ImageNet; part masks of PartImageNet (He et al., ECCV 2022, arXiv 2112.00933), drawn by its "
        "annotators for eleven supercategories.",
    ),
    "partimagenet_pp": Provenance(
        "PARTONOMY PartImageNet++",
        "Photographs of ImageNet; part masks of PartImageNet++ (Li et al., ECCV 2024, arXiv 2407.10918), drawn by its "
        "annotators for all 1,000 classes.",
    ),
}
"""Source -> origin of its images and masks."""

DRAWN = (
    "About a tenth of the images, drawn by path, is validation and a tenth is test, unless the files define splits; "
    "all objects of an image are in one split."
)
SPLITS = {
    "mini": "No drawing is in two splits.",
    "mini_hard": "No drawing is in two splits.",
    "core": "The release has one split, `test`.",
    **dict.fromkeys(DRAWN_SPLITS, DRAWN),
    **dict.fromkeys(PUBLISHED_PARTS, "The splits are those of the published files; no image is in two of them."),
    "partimagenet_pp": "The publishers define no splits: the last tenth of the images of a class is `test`.",
}
"""Source -> origin of its splits."""
PUBLISHED_SPLITS = "The splits are those of the published files."

FIELDS = {
    "id": "unique in the configuration",
    "image": "embedded; null in a conversation without an image",
    "image_id": "the image, or the object in an image with several",
    "image_label": "the kind of object",
    "masks": "COCO run lengths of the size of the upright image; in questions one per visible part, in conversations "
    "the i-th mask of the i-th span tag, or null in chats without tags",
    "source": "the data set of image and masks",
    "licence": "the terms stated by that data set",
    "messages": "a conversation; phrases of the assistant that name something visible are in span tags, "
    "`<p>left wing</p>`. A literal tag is written `\\<p>`",
    "question_type": "one of ten: " + ", ".join(f"`{name}`" for name in QUESTION_TYPES),
    "question": "in the wording of the official release",
    "choices": "exactly one is correct",
    "correct": "index of the correct choice",
    "choice_parts": "the parts that each choice names",
    "object_question": "null except for `whole_to_part` and `part_to_whole`, as are the next three",
    "object_choices": "exactly one is correct",
    "object_classes": "the label that each names",
    "object_correct": "index of the correct one",
}

TEMPLATE = """---
{{ metadata }}
---

# {{ title }}

{% for paragraph in about -%}
{{ paragraph | wordwrap(118, break_on_hyphens=False) }}

{% endfor -%}
The tasks are those of *Partonomy: Large Multimodal Models with Part-Level Visual Understanding*
([arXiv 2505.20759](https://arxiv.org/abs/2505.20759)). This command wrote this card and its files:

    {{ command }}

```python
from datasets import load_dataset

rows = load_dataset("{{ folder }}", "{{ configs[0].name }}", split="{{ configs[0].splits | first }}")
```

## Configs

| config | rows are | {{ splits | join(" | ") }} |
|---|---|{{ "---:|" * (splits | length) }}
{% for config in configs -%}
| `{{ config.name }}` | {{ config.rows_are }} |
{%- for split in splits %} {{ config.splits[split].rows if split in config.splits else "-" }} |{% endfor %}
{% endfor %}
{{ split_rules | join(" ") }}

## Statistics

| config | split | {{ columns | join(" | ") }} |
|---|---|{{ "---:|" * (columns | length) }}
{% for name, split, counts in statistics -%}
| `{{ name }}` | {{ split }} | {{ counts.values() | join(" | ") }} |
{% endfor %}
Objects, parts and pairs are counted by the labels of masks. An image with objects of two kinds counts twice. A mask is
one part of one object in one image.
{% if by_type %}
| questions by type | {{ by_type.columns | join(" | ") }} |
|---|{{ "---:|" * (by_type.columns | length) }}
{% for name, counts in by_type.rows -%}
| `{{ name }}` | {{ counts | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- if leaks %}
## Accuracy without the image

Accuracy of heuristics that do not see the image, by distractor scheme: the longest and the shortest list of parts, the
list whose parts are most often correct in a training half of the questions, the list most similar to the others, and a
linear classifier of the parts, fitted to that half. A model with no higher accuracy has read nothing from the image.
{% for name, made, table in leaks %}
`{{ name }}`, {{ made }}:

| scheme | {{ table.columns | join(" | ") }} |
|---|{{ "---:|" * (table.columns | length) }}
{% for scheme, shares in table.rows -%}
| {{ scheme }} | {{ shares | join(" | ") }} |
{% endfor %}
{%- endfor %}
{%- endif %}
## Fields
{% for names, features in fields %}
{{ names | join(", ") }}:

| field | type | |
|---|---|---|
{% for name, type, note in features -%}
| `{{ name }}` | {{ type }} | {{ note }} |
{% endfor %}
{%- endfor %}
## Licences and origin

| source | licence | rows |
|---|---|---:|
{% for (source, licence), rows in licences -%}
| {{ source }} | {{ licence }} | {{ rows }} |
{% endfor %}
Questions, conversations and choices are made by code from the masks and may be used under Apache-2.0; images and masks
keep the terms of their source.
{%- if left_out %}

{{ left_out }} records of the source could not be used and were skipped; `errors.jsonl` lists them.
{%- endif %}

## Files

Parquet with embedded images in CONFIG/SPLIT-*.parquet.
{%- if graphs %} `graphs/` contains the part graph and the instance graph of each source.{% endif %}
`sha256sum --check {{ checksums }}` checks them.

## Cite

```bibtex
{{ citation }}
```
"""


@dataclass
class ConfigFacts:
    """The facts about one configuration on the card."""

    name: str
    source: str
    rows_are: str
    features: datasets.Features
    splits: dict[str, Statistics]
    leaks: dict[str, Leak | None] = field(default_factory=dict)
    """Scheme -> leak."""
    made_with: str = ""
    """Distractor scheme of the exported questions."""
    left_out: int = 0


def make_card(configs: list[ConfigFacts], *, folder: str, command: str, citation: str, graphs: bool) -> str:
    """
    Return the card as Markdown.

    Args:
        configs: At least one.
        folder: Name of the data set's folder or repository.
        command: Command that wrote the data set.
        graphs: Whether there are part and instance graphs beside the rows.
    """
    sources = list(dict.fromkeys(config.source for config in configs))
    known = [PROVENANCE.get(source, Provenance(source, f"See the source of `{source}`.")) for source in sources]
    licences = sum((total(config) for config in configs), Statistics()).licences
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE).render(
        metadata=_metadata(configs, title=known[0].title, licences={licence for _, licence in licences}),
        title=known[0].title,
        about=[item.origin for item in known],
        command=command,
        folder=folder,
        configs=configs,
        splits=list(dict.fromkeys(split for config in configs for split in config.splits)),
        split_rules=list(dict.fromkeys(SPLITS.get(source, PUBLISHED_SPLITS) for source in sources)),
        columns=list(Statistics().as_row()),
        statistics=[(c.name, split, s.as_row()) for c in configs for split, s in _with_total(c.splits).items()],
        by_type=_by_type(configs),
        leaks=[(c.name, f"made with `{c.made_with}`", _leak_table(c.leaks)) for c in configs if any(c.leaks.values())],
        fields=_fields(configs),
        licences=[((literal(source), literal(licence)), rows) for (source, licence), rows in sorted(licences.items())],
        left_out=max(config.left_out for config in configs),
        graphs=graphs,
        checksums=CHECKSUMS_FILE,
        citation=citation,
    )


def literal(text: str) -> str:
    """Return a foreign text, such as the name in a descriptor, as Markdown that only displays it.

    >>> literal("car parts"), literal("<img src=x>")
    ('car parts', '`<img src=x>`')
    """
    text = " ".join(text.split())[:MAX_LITERAL]
    if re.fullmatch(r"[\w .,;()/+-]*", text) and "www." not in text.lower():
        return text or "-"
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def total(config: ConfigFacts) -> Statistics:
    return sum(config.splits.values(), Statistics())


def _with_total(splits: dict[str, Statistics]) -> dict[str, Statistics]:
    return splits | {"all": sum(splits.values(), Statistics())} if len(splits) > 1 else splits


def _metadata(configs: list[ConfigFacts], *, title: str, licences: set[str]) -> str:
    rows = sum(total(config).rows for config in configs)
    data = DatasetCardData(
        pretty_name=title,
        license="apache-2.0" if licences == {"Apache-2.0"} else "other",
        language=["en"],
        task_categories=["image-text-to-text", "image-segmentation", "visual-question-answering"],
        tags=["part-segmentation", "grounded-conversation"],
        size_categories=[next((name for limit, name in SIZE_CATEGORIES if rows < limit), "n>1M")],
        configs=[
            {
                "config_name": config.name,
                **({"default": True} if position == 0 else {}),
                "data_files": [{"split": split, "path": f"{config.name}/{split}-*"} for split in config.splits],
            }
            for position, config in enumerate(configs)
        ],
    )
    return data.to_yaml()


def _by_type(configs: list[ConfigFacts]) -> dict[str, list] | None:
    asking = [(config.name, total(config).questions) for config in configs]
    asking = [(name, questions) for name, questions in asking if questions]
    types = [name for name in QUESTION_TYPES if any(questions[name] for _, questions in asking)]
    rows = [(question_type, [questions[question_type] for _, questions in asking]) for question_type in types]
    return {"columns": [f"`{name}`" for name, _ in asking], "rows": rows} if asking else None


def _leak_table(leaks: dict[str, Leak | None]) -> dict[str, list]:
    columns = list(next(filter(None, leaks.values())))
    rows = [
        (scheme, [f"{leak[name]:.3f}" for name in columns] if leak else ["-"] * len(columns))
        for scheme, leak in leaks.items()
    ]
    return {"columns": [name.replace("_", " ") for name in columns], "rows": rows}


def _fields(configs: list[ConfigFacts]) -> list[tuple[list[str], list[tuple[str, str, str]]]]:
    """Return groups of configurations with equal features, and these features."""
    groups: dict[str, tuple[list[str], list[tuple[str, str, str]]]] = {}
    for config in configs:
        features = [(name, _type(feature), FIELDS[name]) for name, feature in config.features.items()]
        names, _ = groups.setdefault(json.dumps(features), ([], features))
        names.append(f"`{config.name}`")
    return list(groups.values())


def _type(feature: datasets.features.features.FeatureType) -> str:
    """
    Return a feature type in words.

    >>> _type(datasets.List({"label": datasets.Value("string")}))
    'list of {label: string}'
    """
    match feature:
        case datasets.List():
            return f"list of {_type(feature.feature)}"
        case dict():
            return "{" + ", ".join(f"{name}: {_type(inner)}" for name, inner in feature.items()) + "}"
        case datasets.Value():
            return feature.dtype
        case _:
            return type(feature).__name__.lower()
