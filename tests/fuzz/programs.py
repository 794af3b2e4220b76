"""
What the files of a checkpoint and the requests of strangers may make the programs do. They cost too much to start for
every input, so a checkpoint and a server are made once.
"""

import atexit
import json
import os
import shutil
import tempfile
import uuid
from functools import cache
from pathlib import Path

from plum_partonomy.masks import DataError

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
SECONDS = 60
"""Longest time that the server may take for an answer."""


@cache
def sound_checkpoint() -> Path:
    """The folder of a tiny checkpoint; it lasts as long as the process."""
    from tests.tiny import tiny_model, tiny_processor

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def checkpoint_folder(data: bytes) -> bool:
    """A checkpoint; the first byte says which of its small files has the other bytes as its content."""
    from plum_partonomy.inference.checkpoint import load_checkpoint

    if not data:
        return False
    sound, replaced = sound_checkpoint(), CHECKPOINT_FILES[data[0] % len(CHECKPOINT_FILES)]
    with tempfile.TemporaryDirectory() as folder:
        for path in sound.iterdir():
            if path.is_file() and path.name != replaced:
                (Path(folder) / path.name).symlink_to(path)
        (Path(folder) / replaced).write_bytes(data[1:])
        try:
            model, processor = load_checkpoint(folder)
        except DataError:
            return False
        assert model.config.vlm_config.image_token_id == processor.image_token_id
    return True


@cache
def running_app() -> tuple[str, str]:
    """The address of the demonstration with a tiny model, and an image that was uploaded to it."""
    from demo.app import Demo, serve
    from demo.checkpoints import Checkpoint
    from plum_partonomy.inference.one_image import Plum
    from plum_partonomy.scoring.benchmark import load_questions
    from tests.tiny import random_image, tiny_model, tiny_processor

    uploads = tempfile.mkdtemp(dir=sound_checkpoint())
    os.environ["GRADIO_TEMP_DIR"] = uploads
    folder = str(Path(__file__).parents[2] / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=folder, limit=3)
    demo = Demo([Checkpoint("tiny", Plum(tiny_model(), tiny_processor()))], rows, questions, uploads=Path(uploads))
    address = serve(demo).local_url
    image = Path(uploads) / "image.png"
    random_image().save(image)
    return address, str(image)


def app_request(data: bytes) -> bool:
    """
    The body of a request to the app's queue, IMAGE standing for an uploaded one: it is answered, and so is the next
    one. Says whether it succeeded.
    """
    import httpx

    address, image = running_app()
    session = uuid.uuid4().hex
    body = data.replace(b"IMAGE", image.encode()).replace(b"SESSION", session.encode())
    headers = {"Content-Type": "application/json"}
    joined = httpx.post(f"{address}gradio_api/queue/join", content=body, headers=headers, timeout=SECONDS)
    succeeded = False
    if joined.is_success and session.encode() in body and json.loads(body).get("session_hash") == session:
        where = {"params": {"session_hash": session}, "timeout": SECONDS}
        with httpx.stream("GET", f"{address}gradio_api/queue/data", **where) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    succeeded = message["success"]
                    break
    assert httpx.get(f"{address}config", timeout=SECONDS).is_success
    return succeeded
