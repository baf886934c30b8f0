"""Names of the files and folders of a run; docs/training.md describes them. Needs no torch."""

CONFIG = "config.yaml"
LOG = "log.jsonl"
ALARMS = "alarms.jsonl"
ENVIRONMENT = "environment.json"
PROBES = "probe.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
EXPORT = "export"
STEP = "step.json"  # in EXPORT: the step its weights are from
HEAD, TEACHER = "head.safetensors", "teacher.safetensors"  # next to the encoder, from another project's checkpoint
