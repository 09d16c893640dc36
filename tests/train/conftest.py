"""Settings of tiny runs, in one thread."""

from tiny_run import (  # noqa: F401
    data_file,
    feedback_file,
    make_settings,
    model_folder,
    one_thread,
    pairs_file,
    quick_figures,
    settings,
)
