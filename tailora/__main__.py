"""`python -m tailora` is the program `tailora`: what torchrun and accelerate start, as `torchrun ... -m tailora`."""

from tailora.cli.__main__ import run

if __name__ == "__main__":
    run()
