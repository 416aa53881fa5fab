/* kernels.cpp - all kernels as host code; see emulate.h. */
#include "attention.cu"
#include "inputs.cu"
#include "linear.cu"
#include "dequantized.cu"
#include "rows.cu"
#include "sample.cu"
#include "sums.cu"
#include "tensor.cu"
