"""The loss for `kernels.get_local_kernel(Path("examples/hf_kernel"))`; d2v-fast itself must be installed."""

from d2v_fast import Data2VecLoss, EMATeacher, data2vec_loss

__all__ = ["Data2VecLoss", "EMATeacher", "data2vec_loss"]
