// The exit gate, for exit_head.
#pragma once

#include "survivors.h"

namespace elf_fast {

// exit_gate of logits [N, C]; see exit_gate.cpp.
GateOutputs run_gate(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                     int64_t criterion, const std::optional<Tensor>& target, bool early_stop);

}  // namespace elf_fast
