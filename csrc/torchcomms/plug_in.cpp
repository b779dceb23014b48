// hxcomm._torchcomms: hxcomm as a C++ backend of the torchcomms package. Built only where its headers are installed.
//
// A backend in C++ gets what torchcomms keeps from one in Python (hxcomm/torchcomms/plugin.py): timeout and hints of
// each call, the factor of PREMUL_SUM, batches, abort and reconfigure. Every call goes on to a TorchComm of
// hxcomm.torchcomms, so there is one implementation; an error of it passes through as it is, with its type.
// Windows and the persistent all_gather are left to torchcomms, which says that this backend has none.
#include <torch/csrc/utils/pybind.h>
// after it: the casters of containers of tensors
#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <array>
#include <comms/torchcomms/TorchCommBackend.hpp>
#include <comms/torchcomms/TorchCommFactory.hpp>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace {

using namespace torch::comms;  // NOLINT: nearly every name below is one of it
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<TorchWork>;

py::module_ ours() { return py::module_::import("hxcomm.torchcomms"); }

// None: the communicator's.
py::object timeout_of(std::chrono::milliseconds timeout) {
  return timeout == kNoTimeout ? py::object(py::none()) : py::cast(timeout);
}

py::object reduction(const ReduceOp& op) {
  // In the order of torchcomms' enumeration, whose values are fixed by its bindings.
  static constexpr std::array kinds = {"SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM", "AVG"};
  const py::object kind = ours().attr("ReduceOp").attr(kinds.at(static_cast<size_t>(op.type())));
  if (!op.factor().has_value()) return kind;
  return kind(std::visit([](const auto& factor) -> py::object { return py::cast(factor); }, *op.factor()));
}

// An operation that was started. torchcomms asks a work for its state without a virtual call, so it sees the end only
// once somebody has waited.
class Work : public TorchWork {
 public:
  explicit Work(py::object work) : work_(std::move(work)) { setStatus(WorkStatus::INPROGRESS); }
  ~Work() override {
    const py::gil_scoped_acquire gil;
    work_ = py::object();
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  void wait() override {
    const py::gil_scoped_acquire gil;
    try {
      work_.attr("wait")();
    } catch (const py::error_already_set&) {
      const bool late = work_.attr("status").attr("name").cast<std::string>() == "TIMEDOUT";
      setStatus(late ? WorkStatus::TIMEDOUT : WorkStatus::ERROR);
      throw;
    }
    setStatus(WorkStatus::COMPLETED);
  }

 private:
  py::object work_;
};

// Methods without `override` are virtual in some versions of torchcomms only.
class Backend : public TorchCommBackend {
 public:
  Backend() = default;
  ~Backend() override {
    const py::gil_scoped_acquire gil;
    comm_ = py::object();
  }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  void init(at::Device device, const std::string& name, const CommOptions& options) override {
    const py::gil_scoped_acquire gil;
    const py::object store = options.store ? py::cast(options.store) : py::object(py::none());
    adopt(ours().attr("new_comm")(
              "hxcomm", device, name,
              py::arg("abort_process_on_timeout_or_error") = options.abort_process_on_timeout_or_error,
              py::arg("timeout") = options.timeout, py::arg("store") = store,
              py::arg("enable_reconfigure") = options.enable_reconfigure, py::arg("hints") = options.hints),
          device, name, options);
  }

  void finalize() override { ask("finalize"); }
  int getRank() const override { return ask<int>("get_rank"); }
  int getSize() const override { return ask<int>("get_size"); }
  std::string_view getBackendName() const override { return "hxcomm"; }
  std::string_view getBackendVersion() const override { return version_; }
  std::string_view getCommName() const override { return name_; }
  const CommOptions& getOptions() const override { return options_; }
  const at::Device& getDevice() const override { return device_; }
  void setTimeout(std::chrono::milliseconds timeout) { ask("set_timeout", timeout); }

  WorkPtr send(const at::Tensor& tensor, int dst, bool async_op, const SendOptions& options) override {
    return call("send", async_op, options, tensor, dst);
  }
  WorkPtr recv(at::Tensor& tensor, int src, bool async_op, const RecvOptions& options) override {
    return call("recv", async_op, options, tensor, src);
  }
  WorkPtr batch_op_issue(const std::vector<BatchSendRecv::P2POp>& ops, bool async_op,
                         const BatchP2POptions& options) override {
    const py::gil_scoped_acquire gil;
    const py::object batch = comm_.attr("batch_op_create")();
    for (const auto& op : ops)
      batch.attr(op.type == BatchSendRecv::P2POp::OpType::SEND ? "send" : "recv")(op.tensor, op.peer);
    const py::object ours_options =
        ours().attr("BatchP2POptions").attr("of")(timeout_of(options.timeout), options.hints);
    return work_of(async_op, batch.attr("issue")(async_op, ours_options));
  }

  WorkPtr broadcast(at::Tensor& tensor, int root, bool async_op, const BroadcastOptions& options) override {
    return call("broadcast", async_op, options, tensor, root);
  }
  WorkPtr all_reduce(at::Tensor& tensor, const ReduceOp& op, bool async_op, const AllReduceOptions& options) override {
    return call("all_reduce", async_op, options, tensor, op);
  }
  WorkPtr reduce(const at::Tensor& tensor, int root, const ReduceOp& op, bool async_op,
                 const ReduceOptions& options) override {
    return call("reduce", async_op, options, tensor, root, op);
  }
  WorkPtr all_gather(const Tensors& outputs, const at::Tensor& input, bool async_op,
                     const AllGatherOptions& options) override {
    return call("all_gather", async_op, options, outputs, input);
  }
  WorkPtr all_gather_v(const Tensors& outputs, const at::Tensor& input, bool async_op,
                       const AllGatherOptions& options) override {
    return call("all_gather_v", async_op, options, outputs, input);
  }
  WorkPtr all_gather_single(at::Tensor& output, const at::Tensor& input, bool async_op,
                            const AllGatherSingleOptions& options) override {
    return call("all_gather_single", async_op, options, output, input);
  }
  WorkPtr reduce_scatter(at::Tensor& output, const Tensors& inputs, const ReduceOp& op, bool async_op,
                         const ReduceScatterOptions& options) override {
    return call("reduce_scatter", async_op, options, output, inputs, op);
  }
  WorkPtr reduce_scatter_v(at::Tensor& output, const Tensors& inputs, const ReduceOp& op, bool async_op,
                           const ReduceScatterOptions& options) override {
    return call("reduce_scatter_v", async_op, options, output, inputs, op);
  }
  WorkPtr reduce_scatter_single(at::Tensor& output, const at::Tensor& input, const ReduceOp& op, bool async_op,
                                const ReduceScatterSingleOptions& options) override {
    return call("reduce_scatter_single", async_op, options, output, input, op);
  }
  WorkPtr all_to_all_single(at::Tensor& output, const at::Tensor& input, bool async_op,
                            const AllToAllSingleOptions& options) override {
    return call("all_to_all_single", async_op, options, output, input);
  }
  WorkPtr all_to_all_v_single(at::Tensor& output, const at::Tensor& input, const std::vector<uint64_t>& output_splits,
                              const std::vector<uint64_t>& input_splits, bool async_op,
                              const AllToAllvSingleOptions& options) override {
    return call("all_to_all_v_single", async_op, options, output, input, output_splits, input_splits);
  }
  WorkPtr all_to_all(const Tensors& outputs, const Tensors& inputs, bool async_op,
                     const AllToAllOptions& options) override {
    return call("all_to_all", async_op, options, outputs, inputs);
  }
  WorkPtr barrier(bool async_op, const BarrierOptions& options) override { return call("barrier", async_op, options); }
  WorkPtr scatter(at::Tensor& output, const Tensors& inputs, int root, bool async_op,
                  const ScatterOptions& options) override {
    return call("scatter", async_op, options, output, inputs, root);
  }
  WorkPtr gather(const Tensors& outputs, const at::Tensor& input, int root, bool async_op,
                 const GatherOptions& options) override {
    return call("gather", async_op, options, outputs, input, root);
  }
  WorkPtr gather_single(at::Tensor& output, const at::Tensor& input, int root, bool async_op,
                        const GatherSingleOptions& options) override {
    return call("gather_single", async_op, options, output, input, root);
  }

  std::shared_ptr<TorchCommBackend> split(const std::vector<int>& ranks, const std::string& name,
                                          const CommOptions& options) override {
    const py::gil_scoped_acquire gil;
    const py::object child = comm_.attr("split")(ranks, name, options.hints, timeout_of(options.timeout));
    if (child.is_none()) return nullptr;
    auto backend = std::make_shared<Backend>();
    backend->adopt(child, device_, name, options);
    return backend;
  }

  void abort() override { ask("abort"); }
  bool supportsReconfigure() const override { return true; }
  InitHandle getInitHandle() const override { return ask<InitHandle>("get_init_handle"); }
  WorkPtr reconfigure(const ReconfigureOptions& options) override {
    const py::gil_scoped_acquire gil;
    const py::object timeout = options.timeout ? timeout_of(*options.timeout) : py::object(py::none());
    // A set of handles becomes a set, a list a list: which of them it is says who chooses the order.
    const py::object handles =
        std::visit([](const auto& each) -> py::object { return py::cast(each); }, options.handles);
    return work_of(true, comm_.attr("reconfigure")(options.uuid, handles, timeout, options.hints));
  }

 private:
  void adopt(py::object comm, at::Device device, const std::string& name, const CommOptions& options) {
    comm_ = std::move(comm);
    device_ = device;
    name_ = name;
    options_ = options;
    version_ = comm_.attr("get_backend_version")().cast<std::string>();
  }

  // Result: what the answer becomes while the GIL is held; torchcomms calls without it.
  template <typename Result = void, typename... Arguments>
  Result ask(const char* name, const Arguments&... arguments) const {
    const py::gil_scoped_acquire gil;
    return comm_.attr(name)(arguments...).template cast<Result>();
  }

  static WorkPtr work_of(bool async_op, py::object work) {
    if (!async_op) return c10::make_intrusive<TorchWorkCompleted>();
    return c10::make_intrusive<Work>(std::move(work));
  }

  static const auto& passed(const auto& operand) { return operand; }
  static py::object passed(const ReduceOp& op) { return reduction(op); }

  template <typename Options, typename... Operands>
  WorkPtr call(const char* name, bool async_op, const Options& options, const Operands&... operands) {
    const py::gil_scoped_acquire gil;
    return work_of(
        async_op, comm_.attr(name)(passed(operands)..., py::arg("async_op") = async_op,
                                   py::arg("hints") = options.hints, py::arg("timeout") = timeout_of(options.timeout)));
  }

  py::object comm_;
  at::Device device_{at::kCPU};
  std::string name_, version_;
  CommOptions options_;
};

}  // namespace

PYBIND11_MODULE(_torchcomms, m) {
  m.doc() = "Importing it registers hxcomm with torchcomms.";
  TorchCommFactory::get().register_backend("hxcomm", [] { return std::make_shared<Backend>(); });
}
