#pragma once

#include "../../rolling_cache.h"
#include "../instruction_sets.h"

namespace kernels {

// Rotates and appends tokens [begin, end) of q, k and v, all of one sequence.
FOR_EACH_INSTRUCTION_SET(
    void update_tokens(const Update&, int64_t sequence, int64_t begin, int64_t end))

}  // namespace kernels
