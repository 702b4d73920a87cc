#include "instruction_sets.h"

#include "operator.h"

namespace kernels {
namespace {

// The indices are those in KERNEL. Each set includes the sets before it.
const char* const kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

int best_index() {
#if defined(__x86_64__)
  // __builtin_cpu_supports checks that the operating system saves the registers, too.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 1;
  }
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

bool is_compiled(const std::string& name) {
#if defined(ONLY_INSTRUCTION_SET)
#define TEXT(x) #x
#define TEXT_OF(macro) TEXT(macro)  // a second level, so that the macro is expanded
  return name == TEXT_OF(ONLY_INSTRUCTION_SET);
#else
  return true;
#endif
}

}  // namespace

int chosen = best_index();

std::string instruction_sets() {
  std::string names;
  for (int i = best_index(); i >= 0; --i) {
    if (is_compiled(kNames[i])) names += (names.empty() ? "" : " ") + std::string(kNames[i]);
  }
  return names;
}

void use_instruction_set(std::string name) {
  for (int i = best_index(); i >= 0; --i) {
    if (name == kNames[i] && is_compiled(name)) {
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
