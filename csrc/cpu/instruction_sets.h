// Selection of the instruction set that kernels run with: the best one of the processor, unless
// another one is requested.
#pragma once

#include <string>

namespace kernels {

// Returns the names of the instruction sets that this processor supports and the kernels are
// compiled for, best first, separated by spaces.
std::string instruction_sets();

// Selects one of these sets for all kernels.
void use_instruction_set(std::string name);

extern int chosen;  // index of the selected set; see KERNEL

}  // namespace kernels

// A kernel's header declares it with FOR_EACH_INSTRUCTION_SET(declaration). KERNEL(name) is the
// kernel for the selected instruction set.
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
