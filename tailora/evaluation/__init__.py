"""How good a model is: losses, metrics and their statistics, generated answers, forgetting, spectra of updates."""
