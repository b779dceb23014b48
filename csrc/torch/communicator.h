// The TorchComms front end in C++: what hxcomm.torchcomms.TorchComm calls, without c10d's dispatcher between.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "torch/process_group.h"

namespace hxcomm::torch_glue {

// What a reduction does. The factor of PREMUL_SUM is a number, or a tensor of one element that is read at the call.
struct CommReduceOp {
  CommReduceOp(const std::string& name, const py::object& factor);
  c10d::ReduceOp op;
};

// How to carry a call out: hints as in ApiCall; a timeout below 0 is the communicator's.
struct How {
  bool async_op = false;
  int32_t hints = 0;
  int64_t timeout_ms = -1;
};

// A communicator over a process group, with which it shares the group of the core: calls of both are in one order.
// Null instead of a Work: the call has ended well. Nothing here needs the GIL.
class Communicator {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  // Of tensors on that device: "cpu" or "hx".
  Communicator(c10::intrusive_ptr<ProcessGroup> group, const std::string& device)
      : group_(std::move(group)), on_hx_(device == "hx") {}

  WorkPtr all_reduce(How how, const at::Tensor& tensor, const CommReduceOp& op);
  WorkPtr broadcast(How how, const at::Tensor& tensor, int64_t root);
  WorkPtr reduce(How how, const at::Tensor& tensor, int64_t root, const CommReduceOp& op);
  WorkPtr all_gather(How how, const List& outputs, const at::Tensor& input);
  WorkPtr all_gather_single(How how, const at::Tensor& output, const at::Tensor& input);
  WorkPtr reduce_scatter(How how, const at::Tensor& output, const List& inputs, const CommReduceOp& op);
  WorkPtr reduce_scatter_single(How how, const at::Tensor& output, const at::Tensor& input, const CommReduceOp& op);
  WorkPtr all_to_all(How how, const List& outputs, const List& inputs);
  WorkPtr all_to_all_single(How how, const at::Tensor& output, const at::Tensor& input);
  WorkPtr all_to_all_v_single(How how, const at::Tensor& output, const at::Tensor& input,
                              const std::vector<int64_t>& output_splits, const std::vector<int64_t>& input_splits);
  // The list is the root's: what other ranks pass as one is not looked at.
  WorkPtr gather(How how, const List& outputs, const at::Tensor& input, int64_t root);
  WorkPtr gather_single(How how, const at::Tensor& output, const at::Tensor& input, int64_t root);
  WorkPtr scatter(How how, const at::Tensor& output, const List& inputs, int64_t root);
  WorkPtr barrier(How how);
  WorkPtr send(How how, const at::Tensor& tensor, int peer);
  WorkPtr recv(How how, const at::Tensor& tensor, int peer);
  // All of them begin at once: sends[i] says whether tensors[i] is sent to, or received from, peers[i].
  WorkPtr batch(How how, const std::vector<bool>& sends, const List& tensors, const std::vector<int>& peers);

 private:
  Member self() const { return {group_->getRank(), group_->getSize()}; }
  std::chrono::milliseconds timeout_of(How how) const;
  WorkPtr issue(c10d::OpType type, Tensors&& call, How how);

  void check_device(Tensors& call) const;

  c10::intrusive_ptr<ProcessGroup> group_;
  bool on_hx_;
};

void bind_communicator(py::module_& m);

}  // namespace hxcomm::torch_glue
