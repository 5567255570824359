"""The tasks of the lab for lmms-eval: `write_data` makes them, `examples` reads them."""
