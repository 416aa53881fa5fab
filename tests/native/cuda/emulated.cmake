# Emulated devices for tests, included by the top-level CMakeLists.txt if FABULA_CUDA is EMULATED: the code of native/cuda,
# with its kernels as host code whose threads are fibers, on a runtime that allocates on the heap.
enable_language(CXX)
file(GLOB fabula_cuda_sources CONFIGURE_DEPENDS native/cuda/*.c)
list(FILTER fabula_cuda_sources EXCLUDE REGEX "absent.c$")
add_library(fabula_cuda STATIC ${fabula_cuda_sources} tests/native/cuda/kernels.cpp tests/native/cuda/runtime/heap.cpp)
target_include_directories(fabula_cuda PRIVATE tests/native/cuda/runtime tests/native/cuda native/cuda native/include native/src)
target_compile_definitions(fabula_cuda PRIVATE _GNU_SOURCE FABULA_CUDA_EMULATED=1)
set_target_properties(fabula_cuda PROPERTIES CXX_STANDARD 17 CXX_VISIBILITY_PRESET hidden)
target_link_libraries(fabula_cuda PRIVATE ${CMAKE_DL_LIBS})
include(tests/native/cuda/runtime/nccl.cmake)
add_dependencies(fabula_cuda fake_nccl)
# Replaces cuBLASLt, and is loaded in the same way.
add_library(fabula_products SHARED tests/native/cuda/runtime/library.cpp)
target_include_directories(fabula_products PRIVATE tests/native/cuda/runtime native/include native/src)
set_target_properties(fabula_products PROPERTIES CXX_STANDARD 17)
target_compile_options(fabula_products PRIVATE -Wall -Wextra -O2)
include(tests/native/cuda/fma.cmake)
target_compile_options(fabula_cuda PRIVATE -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off
  $<$<COMPILE_LANGUAGE:CXX>:-O2> $<$<COMPILE_LANGUAGE:CXX>:${fma}>)
