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

extern int chosen;  // index of the selected set in INSTRUCTION_SETS

// Returns the function of the selected set.
template <typename Function, int kCount>
Function selected(const Function (&functions)[kCount]) {
  return functions[chosen];
}

}  // namespace kernels

// The instruction sets that the kernels are compiled for, as DO(set, ...) for each one. Each set
// includes the sets before it. ops/compiler.py has the compiler options of each set. In a library
// for one set, the macro ONLY_INSTRUCTION_SET is its name.
#if defined(ONLY_INSTRUCTION_SET)
#define INSTRUCTION_SETS(DO, ...) DO(ONLY_INSTRUCTION_SET, __VA_ARGS__)
#elif defined(__x86_64__)
#define INSTRUCTION_SETS(DO, ...) \
  DO(plain, __VA_ARGS__) DO(avx2, __VA_ARGS__) DO(avx512, __VA_ARGS__) DO(avx512_bf16, __VA_ARGS__)
#elif defined(__aarch64__) && defined(__linux__)
#define INSTRUCTION_SETS(DO, ...) DO(plain, __VA_ARGS__) DO(neon_bf16, __VA_ARGS__)
#else
#define INSTRUCTION_SETS(DO, ...) DO(plain, __VA_ARGS__)
#endif

// A kernel's header declares it with FOR_EACH_INSTRUCTION_SET(declaration). KERNEL(name) is the
// kernel for the selected instruction set.
#define DECLARE_IN(set, ...) namespace set { __VA_ARGS__; }
#define FOR_EACH_INSTRUCTION_SET(...) INSTRUCTION_SETS(DECLARE_IN, __VA_ARGS__)
#define ADDRESS_IN(set, name) &kernels::set::name,
#define KERNEL(name) kernels::selected({INSTRUCTION_SETS(ADDRESS_IN, name)})
