"""Settings of tiny runs, in one thread."""

from tiny_run import data_file, make_settings, model_folder, one_thread, settings  # noqa: F401
