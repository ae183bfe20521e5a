// The exit gate, for exit_head and exit_head_into.
#pragma once

#include "leavers.h"

namespace elf_fast {

// exit_gate of logits [N, C]; see exit_gate.cpp.
GateOutputs run_gate(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                     int64_t criterion, const std::optional<Tensor>& target, bool early_stop);

// exit_gate_into of logits [n, C].
void run_gate_into(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                   int64_t criterion, bool is_last, int64_t exit, const Outputs& to);

}  // namespace elf_fast
