"""Worker process: owns the bytes. Which tokens stay is decided and carried out here."""
