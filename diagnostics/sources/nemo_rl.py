"""NeMo-RL: what its Logger hands to TensorBoard, W&B or MLflow."""

from outspoken.diagnostics.sources.names import Family

NEMO_RL = Family("nemo_rl", title="NeMo-RL", signs=("train/gen_kl_error", "train/token_mult_prob_error"))
