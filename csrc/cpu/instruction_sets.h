// Which version of a kernel runs: that for the best instruction set of the processor, or another
// that was asked for.
#pragma once

#include <string>

namespace kernels {

// The processor's instruction sets that kernels are compiled for, blanks between, the best first.
std::string instruction_sets();

// Makes kernels use one of them.
void use_instruction_set(std::string name);

extern int chosen;  // an index into the versions below

}  // namespace kernels

// For a kernel's header: FOR_EACH_INSTRUCTION_SET(its declaration). KERNEL(its name) calls it.
#if defined(__x86_64__)
#define FOR_EACH_INSTRUCTION_SET(...)  \
  namespace plain { __VA_ARGS__; }     \
  namespace avx2 { __VA_ARGS__; }      \
  namespace avx512 { __VA_ARGS__; }    \
  namespace avx512_bf16 { __VA_ARGS__; }
#define KERNEL(name)                                    \
  (kernels::chosen == 3   ? kernels::avx512_bf16::name  \
   : kernels::chosen == 2 ? kernels::avx512::name       \
   : kernels::chosen == 1 ? kernels::avx2::name         \
                          : kernels::plain::name)
#else
#define FOR_EACH_INSTRUCTION_SET(...) namespace plain { __VA_ARGS__; }
#define KERNEL(name) kernels::plain::name
#endif
