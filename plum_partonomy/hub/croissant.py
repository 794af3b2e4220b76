"""Check that the Hub can describe a data set in Croissant (mlcommons.org/croissant), from its card and Parquet files.

The Hub writes the description itself. A repository must have a name, a description, a licence, and for each
configuration files of one schema. The columns become fields of a record set: text, numbers, booleans, images, and
lists or structs of these.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard

from plum_partonomy.masks import DataError

__all__ = ["check_croissant", "data_type"]

IMAGE_FIELDS = {"bytes", "path"}


def check_croissant(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of each configuration's records: column -> Croissant data type.

    Raises:
        DataError: The card lacks what Croissant requires, or the files of a configuration have no schema or several;
            says which.
    """
    card = DatasetCard.load(folder / "README.md")
    where, data = f"{folder / 'README.md'}", card.data.to_dict()
    if not data.get("license") and not data.get("license_name"):
        raise DataError(f"{where}: Croissant needs a 'license' in the metadata, found none.")
    paragraphs = [text.strip() for text in card.text.split("\n\n")]
    if not any(text and not text.startswith(("#", "|", "`", "-")) for text in paragraphs):
        raise DataError(f"{where}: Croissant needs a description, found no paragraph of text.")
    if not data.get("pretty_name") and not any(text.startswith("# ") for text in paragraphs):
        raise DataError(f"{where}: Croissant needs a name; add 'pretty_name' to the metadata or a heading.")
    configs: dict[str, dict[str, Any]] = {}
    for config in data.get("configs") or []:
        name = config["config_name"]
        if name in configs:
            raise DataError(f"{where}: the configuration {name!r} occurs twice.")
        configs[name] = _fields(folder, name, config.get("data_files") or [])
    return configs


def _fields(folder: Path, config: str, data_files: Any) -> dict[str, Any]:
    """Return column -> data type of one configuration, the same in all its files."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    patterns = [path for pattern in patterns for path in ([pattern] if isinstance(pattern, str) else pattern)]
    found = [sorted(folder.glob(pattern)) for pattern in patterns]
    if not patterns or not all(found):
        missing = patterns[found.index([])] if patterns else "data_files"
        raise DataError(f"{folder}: the configuration {config!r} names {missing!r}, where there is no file.")
    paths = [path for files in found for path in files]
    if len(set(paths)) < len(paths):
        raise DataError(f"{folder}: two splits of the configuration {config!r} share a file.")
    schemas = {path: pq.read_schema(path).remove_metadata() for path in paths if path.suffix == ".parquet"}
    if len(schemas) < len(paths):
        other = next(path for path in paths if path not in schemas)
        raise DataError(f"{other}: expected Parquet, which is what the Hub describes in Croissant.")
    first = next(iter(schemas))
    for path, schema in schemas.items():
        if schema != schemas[first]:
            raise DataError(f"{path}: its columns or types are not those of {first}, of the same configuration.")
    return {field.name: data_type(field.type, where=f"{first}, column {field.name!r}") for field in schemas[first]}


def data_type(kind: pa.DataType, *, where: str) -> Any:
    """Return the Croissant data type of a column: a name, a list of one, or a mapping of sub-fields.

    >>> data_type(pa.list_(pa.struct([("label", pa.string())])), where="column")
    [{'label': 'sc:Text'}]

    Raises:
        DataError: Croissant has none, such as for bytes that are no image.
    """
    if pa.types.is_struct(kind):
        names = {kind.field(index).name for index in range(kind.num_fields)}
        if names == IMAGE_FIELDS:
            return "sc:ImageObject"
        fields = (kind.field(index) for index in range(kind.num_fields))
        return {field.name: data_type(field.type, where=f"{where}, field {field.name!r}") for field in fields}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [data_type(kind.value_type, where=where)]
    names = {
        "sc:Text": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "sc:Boolean": pa.types.is_boolean(kind),
        "sc:Integer": pa.types.is_integer(kind),
        "sc:Float": pa.types.is_floating(kind),
    }
    found = next((name for name, fits in names.items() if fits), None)
    if found is None:
        raise DataError(f"{where}: Croissant has no data type for {kind}.")
    return found
