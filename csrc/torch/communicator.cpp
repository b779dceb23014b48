#include "torch/communicator.h"

#include <torch/csrc/autograd/python_variable.h>

#include <unordered_map>

#include "torch/calls.h"

namespace hxcomm::torch_glue {
namespace {

using c10d::OpType;

c10d::ReduceOp reduce_op_from(const std::string& name, const py::object& factor) {
  static const std::unordered_map<std::string, c10d::ReduceOp::RedOpType> kinds{
      {"SUM", c10d::ReduceOp::SUM},   {"PRODUCT", c10d::ReduceOp::PRODUCT}, {"MIN", c10d::ReduceOp::MIN},
      {"MAX", c10d::ReduceOp::MAX},   {"BAND", c10d::ReduceOp::BAND},       {"BOR", c10d::ReduceOp::BOR},
      {"BXOR", c10d::ReduceOp::BXOR}, {"AVG", c10d::ReduceOp::AVG},
  };
  if (const auto kind = kinds.find(name); kind != kinds.end() && factor.is_none()) return kind->second;
  if (name != "PREMUL_SUM" || factor.is_none())
    throw py::value_error("PREMUL_SUM needs a factor, " + name + " takes none");
  if (THPVariable_Check(factor.ptr())) return c10d::makePreMulSum(factor.cast<at::Tensor>());
  return c10d::makePreMulSum(factor.cast<double>());
}

}  // namespace

CommReduceOp::CommReduceOp(const std::string& name, const py::object& factor) : op(reduce_op_from(name, factor)) {}

std::chrono::milliseconds Communicator::timeout_of(How how) const {
  return how.timeout_ms < 0 ? group_->timeout() : std::chrono::milliseconds(how.timeout_ms);
}

void Communicator::check_device(Tensors& call) const {
  if (call.problem().empty() && call.is_hx() != on_hx_)
    call.fail(std::string("tensors on ") + (on_hx_ ? "cpu" : "hx") + ", but this communicator is for " +
              (on_hx_ ? "hx" : "cpu"));
}

Communicator::WorkPtr Communicator::issue(OpType type, Tensors&& call, How how) {
  call.set_hints(how.hints);
  if (type != OpType::BARRIER) check_device(call);
  if (!how.async_op) {
    group_->issuer().carry_out(call, timeout_of(how));
    return nullptr;
  }
  std::vector<Tensors> calls;
  calls.push_back(std::move(call));
  return group_->issuer().issue(type, std::move(calls), timeout_of(how), how.async_op);
}

Communicator::WorkPtr Communicator::all_reduce(How how, const at::Tensor& tensor, const CommReduceOp& op) {
  Tensors call(kAllReduce, "all_reduce");
  fill_all_reduce(call, tensor, op.op);
  return issue(OpType::ALLREDUCE, std::move(call), how);
}

Communicator::WorkPtr Communicator::broadcast(How how, const at::Tensor& tensor, int64_t root) {
  Tensors call(kBroadcast, "broadcast");
  fill_broadcast(call, tensor, root, self());
  return issue(OpType::BROADCAST, std::move(call), how);
}

Communicator::WorkPtr Communicator::reduce(How how, const at::Tensor& tensor, int64_t root, const CommReduceOp& op) {
  Tensors call(kReduce, "reduce");
  fill_reduce(call, tensor, root, op.op, self());
  return issue(OpType::REDUCE, std::move(call), how);
}

Communicator::WorkPtr Communicator::all_gather(How how, const List& outputs, const at::Tensor& input) {
  Tensors call(kAllGather, "all_gather");
  fill_all_gather(call, outputs, input, self());
  return issue(OpType::ALLGATHER, std::move(call), how);
}

Communicator::WorkPtr Communicator::all_gather_single(How how, const at::Tensor& output, const at::Tensor& input) {
  Tensors call(kAllGather, "all_gather_single");
  fill_all_gather(call, output, input, self());
  return issue(OpType::_ALLGATHER_BASE, std::move(call), how);
}

Communicator::WorkPtr Communicator::reduce_scatter(How how, const at::Tensor& output, const List& inputs,
                                                   const CommReduceOp& op) {
  Tensors call(kReduceScatter, "reduce_scatter");
  fill_reduce_scatter(call, output, inputs, op.op, self());
  return issue(OpType::REDUCE_SCATTER, std::move(call), how);
}

Communicator::WorkPtr Communicator::reduce_scatter_single(How how, const at::Tensor& output, const at::Tensor& input,
                                                          const CommReduceOp& op) {
  Tensors call(kReduceScatter, "reduce_scatter_single");
  fill_reduce_scatter(call, output, input, op.op, self());
  return issue(OpType::_REDUCE_SCATTER_BASE, std::move(call), how);
}

Communicator::WorkPtr Communicator::all_to_all(How how, const List& outputs, const List& inputs) {
  Tensors call(kAllToAll, "all_to_all");
  fill_all_to_all(call, outputs, inputs, self());
  return issue(OpType::ALLTOALL, std::move(call), how);
}

Communicator::WorkPtr Communicator::all_to_all_single(How how, const at::Tensor& output, const at::Tensor& input) {
  Tensors call(kAllToAll, "all_to_all_single");
  fill_all_to_all(call, output, input, {}, {}, self());
  return issue(OpType::ALLTOALL_BASE, std::move(call), how);
}

Communicator::WorkPtr Communicator::all_to_all_v_single(How how, const at::Tensor& output, const at::Tensor& input,
                                                        const std::vector<int64_t>& output_splits,
                                                        const std::vector<int64_t>& input_splits) {
  Tensors call(kAllToAll, "all_to_all_v_single");
  fill_all_to_all(call, output, input, output_splits, input_splits, self());
  return issue(OpType::ALLTOALL_BASE, std::move(call), how);
}

Communicator::WorkPtr Communicator::gather(How how, const List& outputs, const at::Tensor& input, int64_t root) {
  Tensors call(kGather, "gather");
  fill_gather(call, root == group_->getRank() ? &outputs : nullptr, input, root, self());
  return issue(OpType::GATHER, std::move(call), how);
}

Communicator::WorkPtr Communicator::gather_single(How how, const at::Tensor& output, const at::Tensor& input,
                                                  int64_t root) {
  Tensors call(kGather, "gather_single");
  fill_gather(call, output, input, root, self());
  return issue(OpType::GATHER, std::move(call), how);
}

Communicator::WorkPtr Communicator::scatter(How how, const at::Tensor& output, const List& inputs, int64_t root) {
  Tensors call(kScatter, "scatter");
  fill_scatter(call, output, root == group_->getRank() ? &inputs : nullptr, root, self());
  return issue(OpType::SCATTER, std::move(call), how);
}

Communicator::WorkPtr Communicator::barrier(How how) {
  return issue(OpType::BARRIER, Tensors(kBarrier, "barrier"), how);
}

Communicator::WorkPtr Communicator::send(How how, const at::Tensor& tensor, int peer) {
  Tensors call(kSend, "send");
  fill_send(call, tensor, peer, /*tag=*/0, self());
  return issue(OpType::SEND, std::move(call), how);
}

Communicator::WorkPtr Communicator::recv(How how, const at::Tensor& tensor, int peer) {
  Tensors call(kRecv, "recv");
  fill_recv(call, tensor, peer, /*tag=*/0, self());
  return issue(OpType::RECV, std::move(call), how);
}

Communicator::WorkPtr Communicator::batch(How how, const std::vector<bool>& sends, const List& tensors,
                                          const std::vector<int>& peers) {
  std::vector<Tensors> calls;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensors& call = calls.emplace_back(sends[i] ? kSend : kRecv, sends[i] ? "send" : "recv");
    call.set_hints(how.hints);
    sends[i] ? fill_send(call, tensors[i], peers[i], 0, self()) : fill_recv(call, tensors[i], peers[i], 0, self());
    check_device(call);
  }
  return group_->issuer().issue(OpType::COALESCED, std::move(calls), timeout_of(how), how.async_op);
}

void bind_communicator(py::module_& m) {
  py::class_<CommReduceOp>(m, "ReduceOp")
      .def(py::init<const std::string&, const py::object&>(), py::arg("name"), py::arg("factor") = py::none());
  py::class_<Communicator> bound(m, "Communicator");
  bound.def(py::init<c10::intrusive_ptr<ProcessGroup>, const std::string&>(), py::arg("process_group"),
            py::arg("device"));
  // In Python: the operands, then async_op, hints and timeout_ms.
  const auto def = [&]<typename... Operands>(const char* name,
                                             Communicator::WorkPtr (Communicator::*method)(How, Operands...)) {
    bound.def(name,
              [method](Communicator& self, Operands... operands, bool async_op, int32_t hints, int64_t timeout_ms) {
                const py::gil_scoped_release no_gil;
                return (self.*method)({async_op, hints, timeout_ms}, operands...);
              });
  };
  def("all_reduce", &Communicator::all_reduce);
  def("broadcast", &Communicator::broadcast);
  def("reduce", &Communicator::reduce);
  def("all_gather", &Communicator::all_gather);
  def("all_gather_v", &Communicator::all_gather);  // which takes any sizes
  def("all_gather_single", &Communicator::all_gather_single);
  def("reduce_scatter", &Communicator::reduce_scatter);
  def("reduce_scatter_v", &Communicator::reduce_scatter);
  def("reduce_scatter_single", &Communicator::reduce_scatter_single);
  def("all_to_all", &Communicator::all_to_all);
  def("all_to_all_single", &Communicator::all_to_all_single);
  def("all_to_all_v_single", &Communicator::all_to_all_v_single);
  def("gather", &Communicator::gather);
  def("gather_single", &Communicator::gather_single);
  def("scatter", &Communicator::scatter);
  def("barrier", &Communicator::barrier);
  def("send", &Communicator::send);
  def("recv", &Communicator::recv);
  def("batch", &Communicator::batch);
}

}  // namespace hxcomm::torch_glue
