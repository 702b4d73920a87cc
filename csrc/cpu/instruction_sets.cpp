#include "instruction_sets.h"

#include "operator.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kernels {
namespace {

#define TEXT(set, ...) #set
#define NAME_OF(set, ...) TEXT(set),  // a second level, so that ONLY_INSTRUCTION_SET is expanded
const char* const kNames[] = {INSTRUCTION_SETS(NAME_OF, )};
constexpr int kCount = sizeof kNames / sizeof *kNames;

// ops/compiler.py checks the same features of the processor.
bool is_supported(const std::string& name) {
#if defined(__x86_64__)
  // __builtin_cpu_supports checks that the operating system saves the registers, too.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  if (name == "neon_bf16") return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#endif
  return name == "plain";
}

int best_index() {
  int best = kCount - 1;
  while (best > 0 && !is_supported(kNames[best])) --best;
  return best;
}

}  // namespace

int chosen = best_index();

std::string instruction_sets() {
  std::string names;
  for (int i = kCount - 1; i >= 0; --i) {
    if (is_supported(kNames[i])) names += (names.empty() ? "" : " ") + std::string(kNames[i]);
  }
  return names;
}

void use_instruction_set(std::string name) {
  for (int i = 0; i < kCount; ++i) {
    if (name == kNames[i] && is_supported(name)) {
      chosen = i;
      return;
    }
  }
  check_failed("name must be one of ", instruction_sets(), " on this processor, got ", name);
}

}  // namespace kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) {
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&kernels::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&kernels::use_instruction_set));
}
