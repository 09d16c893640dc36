"""Packs what gpu.py needs on a machine with a GPU but without network into one archive of at most 64 MiB.

    python benchmarks/bundle.py bundle.tar                on a machine with a package index
    tar xf bundle.tar; sh bundle/run.sh                   on the machine with the GPU; writes bundle/gpu.json

The machine needs Python 3.12 with torch, transformers and PEFT. The archive contains the last commit and the wheels of
all other requirements, but not the large packages that these depend on. TRL's arm needs pyarrow and pandas, which are
too large: without them it is reported as failed, and the other arms run.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 64 * 2**20  # bytes
WITH_REQUIREMENTS = ["pydantic", "cyclopts", "pytest", "hypothesis"]
ALONE = ["datasets", "dill", "multiprocess", "xxhash", "gguf", "ruamel.yaml", "trl", "liger-kernel", "bitsandbytes"]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
RUN = """cd "$(dirname "$0")"
python -m pip install --no-index --no-deps wheels/*.whl
cd tailora
PYTHONPATH=$PWD python benchmarks/gpu.py --minutes "${MINUTES:-9}" --out ../gpu.json
"""


def download(packages: list[str], folder: Path, *options: str) -> None:
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    kind = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "-d", folder, *kind, *options, *packages], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    archive = parser.parse_args().archive
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bundle"
        (folder / "tailora").mkdir(parents=True)
        download(WITH_REQUIREMENTS, folder / "wheels")
        download(ALONE, folder / "wheels", "--no-deps")
        source = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder / "tailora"], input=source, check=True)
        (folder / "run.sh").write_text(RUN)
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, "bundle")
    size = archive.stat().st_size
    print(f"{archive}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"that is more than {LIMIT / 2**20:.0f} MiB: remove something from ALONE, bitsandbytes first")


if __name__ == "__main__":
    main()
