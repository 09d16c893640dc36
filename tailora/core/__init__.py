"""The equation of an adapted layer: kinds, scales, inits, and how an adapter meets a layer."""
