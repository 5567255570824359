"""Engine core process: counts blocks, touches no tensor."""
