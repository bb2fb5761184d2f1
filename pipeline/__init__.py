"""Real-time, full-duplex speech with Kyutai's Moshi: the processes' common ground."""

__version__ = "0.1.0"
