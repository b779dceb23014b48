// Calls hxcomm's C++ backend as torchcomms does. One file with it: both modules come out of one library, so that they
// share the factory, which in torchcomms is a library of its own.
#include "torchcomms/plug_in.cpp"

namespace {

template <typename Options>
Options options_from(const Hints& hints, int64_t timeout_ms) {
  Options options;
  options.hints = hints;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  return options;
}

}  // namespace

PYBIND11_MODULE(driver, m) {
  const py::call_guard<py::gil_scoped_release> without_gil;  // as torchcomms' own bindings
  py::class_<TorchWork, c10::intrusive_ptr<TorchWork>>(m, "Work")
      .def("wait", &TorchWork::wait, without_gil)
      .def("status", [](const TorchWork& work) { return static_cast<int>(work.status()); });
  py::class_<TorchCommBackend, std::shared_ptr<TorchCommBackend>>(m, "Backend")
      .def("rank", &TorchCommBackend::getRank, without_gil)
      .def("size", &TorchCommBackend::getSize, without_gil)
      .def("names",
           [](const TorchCommBackend& b) {
             return std::vector<std::string>{std::string(b.getBackendName()), std::string(b.getBackendVersion()),
                                             std::string(b.getCommName()), b.getDevice().str()};
           })
      .def("finalize", &TorchCommBackend::finalize, without_gil)
      .def("abort", &TorchCommBackend::abort, without_gil)
      .def("init_handle", &TorchCommBackend::getInitHandle, without_gil)
      .def(
          "barrier", [](TorchCommBackend& b) { b.barrier(false); }, without_gil)
      .def(
          "all_reduce",
          [](TorchCommBackend& b, at::Tensor tensor, int kind, std::optional<PreMulSumFactorT> factor, bool async_op,
             const Hints& hints, int64_t timeout_ms) {
            return b.all_reduce(tensor, ReduceOp(static_cast<ReduceOp::RedOpType>(kind), std::move(factor)), async_op,
                                options_from<AllReduceOptions>(hints, timeout_ms));
          },
          without_gil)
      .def(
          "all_gather",
          [](TorchCommBackend& b, const Tensors& outputs, const at::Tensor& input) {
            b.all_gather(outputs, input, false);
          },
          without_gil)
      .def(
          "all_to_all_v_single",
          [](TorchCommBackend& b, at::Tensor output, const at::Tensor& input, const std::vector<uint64_t>& splits) {
            b.all_to_all_v_single(output, input, splits, splits, false);
          },
          without_gil)
      .def(
          "exchange",
          [](TorchCommBackend& b, const at::Tensor& sent, const at::Tensor& received, int to, int from) {
            using Op = BatchSendRecv::P2POp;
            return b.batch_op_issue({{Op::OpType::RECV, received, from}, {Op::OpType::SEND, sent, to}}, true);
          },
          without_gil)
      .def(
          "split",
          [](TorchCommBackend& b, const std::vector<int>& ranks, const std::string& name) {
            return b.split(ranks, name, b.getOptions());
          },
          without_gil);
  m.def(
      "new_backend",
      [](const std::string& backend, const std::string& name, const Hints& hints) {
        auto made = TorchCommFactory::get().makers.at(backend)();
        CommOptions options;
        options.abort_process_on_timeout_or_error = false;
        options.hints = hints;
        made->init(at::kCPU, name, options);
        return made;
      },
      without_gil);
}
