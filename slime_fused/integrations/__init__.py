"""This package's losses and kernels in the trainers of other libraries; each module needs its library."""
