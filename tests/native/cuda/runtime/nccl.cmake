# Emulates NCCL. In a folder of its own, which the loader searches only if LD_LIBRARY_PATH names it.
add_library(fake_nccl SHARED ${CMAKE_SOURCE_DIR}/tests/native/cuda/runtime/nccl.cpp)
set_target_properties(fake_nccl PROPERTIES CXX_STANDARD 17 OUTPUT_NAME nccl SOVERSION 2
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/nccl)
target_compile_options(fake_nccl PRIVATE -Wall -Wextra)
