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
        "Drawn by code alone, 128 x 128 pixels, nothing collected or annotated: 12 kinds of object in 4 families with "
        "51 part names, many of them shared. Every object has one or two parts that are always drawn and six that are "
        "drawn about every second time. Pose, colours, background and a small occluder are random; masks are exact to "
        "the pixel. In `mini` a mask covers all instances of a part; in `mini_instances` each instance has a span and "
        "a mask of its own, in random order, so that only the masks already given tell which one is meant. It says "
        "nothing about how a model does on photographs.",
    ),
    "core": Provenance(
        "Partonomy-Core",
        "Images, part masks and questions of the authors' release of Partonomy-Core (arXiv 2505.20759), unchanged.",
    ),
    "own_parts": Provenance(
        "PARTONOMY from own photographs",
        "Photographs and part masks of whoever put them into the folder, who says more of them here.",
    ),
    "descriptor": Provenance(
        "PARTONOMY from a descriptor",
        "Images and part masks of the data set that the descriptor names in `source`, annotated by whoever made it.",
    ),
    "pascal_part": Provenance(
        "PARTONOMY Pascal-Part",
        "Photographs of PASCAL VOC 2010; part masks of Pascal-Part (Chen et al., CVPR 2014, arXiv 1406.2031), drawn "
        "by its annotators, in the COCO form of VLPart (Sun et al., arXiv 2305.11173).",
    ),
    "paco_lvis": Provenance(
        "PARTONOMY PACO-LVIS",
        "Photographs of COCO 2017; object and part masks of PACO-LVIS v1 (Ramanathan et al., CVPR 2023, arXiv "
        "2301.01795), drawn by its annotators. Where several objects of a kind are in an image, a red box is drawn "
        "around the one that is meant.",
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
    "About a tenth of the images, each drawn by its path, is for validation and a tenth for the test, or the splits "
    "are those of the files; all objects of an image are in one split."
)
SPLITS = {
    "mini": "Drawings differ in every split.",
    "core": "The release has one split, for testing.",
    **dict.fromkeys(DRAWN_SPLITS, DRAWN),
    **dict.fromkeys(PUBLISHED_PARTS, "The splits are those of the published files; no image is in two of them."),
    "partimagenet_pp": "The publishers name no splits: the last tenth of the images of a class is for the test.",
}
"""Source -> origin of its splits."""
PUBLISHED_SPLITS = "The splits are those of the published files."

FIELDS = {
    "id": "unique in the config",
    "image": "embedded",
    "image_id": "the image, or the object of an image that shows several",
    "image_label": "the kind of object",
    "masks": "run-length encoded as in COCO, in the frame of the upright image; in questions of every visible part, "
    "in conversations the i-th of the i-th span tag",
    "source": "the data set that image and masks come from",
    "licence": "what that data set says of its terms",
    "messages": "a conversation; phrases of the assistant that name something visible stand in span tags, "
    "`<p>left wing</p>`. A literal tag is written `\\<p>`",
    "question_type": "one of ten: " + ", ".join(f"`{name}`" for name in QUESTION_TYPES),
    "question": "in the wording of the official release",
    "choices": "one is right",
    "correct": "index of the right choice",
    "choice_parts": "the parts that each choice names",
    "object_question": "null but for `whole_to_part` and `part_to_whole`, as are the next three",
    "object_choices": "one is right",
    "object_classes": "the label that each names",
    "object_correct": "index of the right one",
}

TEMPLATE = """---
{{ metadata }}
---

# {{ title }}

{% for paragraph in about -%}
{{ paragraph | wordwrap(118, break_on_hyphens=False) }}

{% endfor -%}
The tasks are those of *Partonomy: Large Multimodal Models with Part-Level Visual Understanding*
([arXiv 2505.20759](https://arxiv.org/abs/2505.20759)). This card and the files beside it were written by

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
Objects, parts and pairs are labels that a mask shows. An image of objects of two kinds counts once for each; a mask is
one of a part of an object in an image.
{% if by_type %}
| questions by type | {{ by_type.columns | join(" | ") }} |
|---|{{ "---:|" * (by_type.columns | length) }}
{% for name, counts in by_type.rows -%}
| `{{ name }}` | {{ counts | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- if leaks %}
## What can be told without the image

How often blind heuristics choose right, by the scheme that the wrong choices are made with: the longest and the
shortest list of parts, the one whose parts are most often right in a training half of the questions, the one most like
the others, and a linear classifier of its parts fitted to that half. A model that does no better has read nothing from
the image.
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

{{ left_out }} records of the source could not be used and were left out; `errors.jsonl` names each.
{%- endif %}

## Files

Parquet with embedded images in CONFIG/SPLIT-*.parquet.
{%- if graphs %} `graphs/` holds the part graph and the instance graph of each source.{% endif %}
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
