// The cells of LSTM and GRU: torch expects fused ones of a device, and has none for CPU. Made of operators with
// gradients of their own, the same ones as the cells on CPU.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "torch/device/kernels.h"

namespace hxcomm::device {
namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;

Tensor with(const Tensor& gates, const Bias& bias) {
  return bias.has_value() && bias->defined() ? gates + *bias : gates;
}

// -> hidden state, cell state, and what a fused backward would need: nothing here.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cell,
                                             const Bias& input_bias, const Bias& hidden_bias) {
  const auto gates = (with(hidden_gates, hidden_bias) + with(input_gates, input_bias)).chunk(4, 1);
  const Tensor next = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * next.tanh(), next, Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden,
                                    const Bias& input_bias, const Bias& hidden_bias) {
  const auto in = with(input_gates, input_bias).chunk(3, 1);
  const auto from = with(hidden_gates, hidden_bias).chunk(3, 1);
  const Tensor reset = (from[0] + in[0]).sigmoid();
  const Tensor update = (from[1] + in[1]).sigmoid();
  const Tensor next = (in[2] + from[2] * reset).tanh();
  return {(hidden - next) * update + next, Tensor()};
}

void register_cells(torch::Library& library) {
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
}

}  // namespace

void start_recurrent() {
  static torch::Library plain(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__,
                                 __LINE__);
  register_cells(plain);
  register_cells(autograd);
}

}  // namespace hxcomm::device
