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
// kernel for the selected instruction set. In a library for one set, the macro
// ONLY_INSTRUCTION_SET is its name.
#if defined(ONLY_INSTRUCTION_SET)
#define FOR_EACH_INSTRUCTION_SET(...) namespace ONLY_INSTRUCTION_SET { __VA_ARGS__; }
#define KERNEL(name) kernels::ONLY_INSTRUCTION_SET::name
#else
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
#endif
