"""The paper's own models and data: InternVL2 and Whisper, LLaVA's mix and the ASR corpora."""
