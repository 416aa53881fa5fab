/* kernels.cpp - all kernels as host code; see emulate.h. */
#include "attention.cu"
#include "linear.cu"
#include "rows.cu"
#include "sample.cu"
#include "sums.cu"
