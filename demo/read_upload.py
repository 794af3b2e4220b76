"""Read one image and write its width, height and RGB pixels; demo/uploads.py runs it with limits.

python demo/read_upload.py IMAGE MAX_PIXELS MAX_BYTES
"""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inputs_plum import read_image
from plum_partonomy.masks import DataError

MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        path, max_pixels, max_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        image = read_image(path, where="The image", max_pixels=max_pixels, max_bytes=max_bytes)
    except DataError as error:
        sys.exit(f"{error}.")
    sys.stdout.buffer.write(b"%d %d\n" % image.size + image.tobytes())


if __name__ == "__main__":
    main()
