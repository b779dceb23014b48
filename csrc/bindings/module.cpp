// hxcomm._core: the communicator for Python, without torch.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings/call_site.h"
#include "bindings/runtime.h"
#include "communicator/api.h"
#include "communicator/floor.h"
#include "communicator/group.h"
#include "communicator/memory_api.h"
#include "core/failpoint.h"
#include "core/reduce.h"
#include "transport/endpoint.h"

namespace py = pybind11;

namespace hxcomm {
namespace {

// A Python object that any C++ thread may drop. A thread that asks for the GIL while the interpreter shuts down is
// ended by Python in the middle of the destructor, which terminates the process: so without the GIL the release is left
// to the main thread, and at exit to nobody.
template <class T>
std::shared_ptr<T> with_gil(T object) {
  return {new T(std::move(object)), [](T* held) {
            if (!Py_IsInitialized()) return;
            if (PyGILState_Check() != 0)
              delete held;
            else
              Py_AddPendingCall(
                  [](void* pointer) {
                    delete static_cast<T*>(pointer);
                    return 0;
                  },
                  held);
          }};
}

Planner planner_from(py::function function) {
  auto held = with_gil(std::move(function));
  return [held](const ChoiceKey& key) {
    const py::gil_scoped_acquire gil;
    try {
      py::dict more;  // what a simple planner need not know
      if (key.mapped) more["mapped"] = true;
      if (key.hints != 0) more["hints"] = key.hints;
      const py::object answer =
          (*held)(op_name(key.op), dtype_name(key.dtype), reduce_op_name(key.reduce_op), key.root, key.nbytes, **more);
      const auto pair = answer.cast<std::pair<std::shared_ptr<Plan>, uint64_t>>();
      return Choice{pair.first, pair.second};
    } catch (py::error_already_set& error) {
      throw Error(ErrorKind::usage, py::str(error.value()).cast<std::string>());
    } catch (const py::cast_error&) {
      throw Error(ErrorKind::usage, "the planner did not return (Plan, segment bytes)");
    }
  };
}

// HXCOMM_EXECUTOR=python: every transfer is done by a Python function, called as
// function(reduce, final, dtype, reduce_op, world_size, count, sources, destinations), where sources and destinations
// are lists of (address, is_partial, factor); the factor is 1 but for the contributions that PREMUL_SUM multiplies.
class PythonTransfer final : public TransferHook {
 public:
  explicit PythonTransfer(py::function function) : function_(with_gil(std::move(function))) {}

  void run(const Binding& b, const Instruction& in) override {
    const uint64_t count = transfer_count(b, in);
    if (count == 0) return;
    const py::gil_scoped_acquire gil;
    py::list lists[2];
    for (int i = 0; i < in.n_sources + in.n_destinations; ++i) {
      const Operand& operand = b.plan->operands[in.first_operand + static_cast<uint32_t>(i)];
      lists[i < in.n_sources ? 0 : 1].append(
          py::make_tuple(reinterpret_cast<uintptr_t>(resolve(b, operand)), is_partial(b, operand),
                         i < in.n_sources && is_scaled(b, operand) ? b.factor : 1.0));
    }
    try {
      (*function_)(is_reduction(b, in), in.final, dtype_name(b.dtype), reduce_op_name(b.reduce_op), b.plan->world_size,
                   count, lists[0], lists[1]);
    } catch (py::error_already_set& error) {
      throw Error(ErrorKind::aborted, std::string("the Python executor failed: ") + error.what());
    }
  }

 private:
  std::shared_ptr<py::function> function_;
};

class PyGroup {
 public:
  PyGroup(std::shared_ptr<Runtime> runtime, GroupConfig config)
      : runtime_(std::move(runtime)),
        group_(std::make_shared<Group>(runtime_->endpoint, runtime_->progress, std::move(config))) {}

  bool connect(int rank, const std::string& address, const std::string& nonce, uint64_t control_offset,
               const std::string& label, int timeout_ms) {
    if (rank < 0 || rank >= group_->world_size() || rank == group_->rank())
      throw Error(ErrorKind::usage, "connect() takes the rank of a peer, not " + std::to_string(rank));
    const Nonce expected = nonce_from(nonce);
    group_->set_label(rank, label);
    const py::gil_scoped_release nogil;
    try {
      group_->attach(rank, runtime_->endpoint->connect(address, expected, timeout_ms), control_offset);
    } catch (const NobodyThere&) {
      return false;
    }
    return true;
  }

  void cross(std::vector<int> hosts, const std::vector<std::string>& processes, std::vector<std::string> labels) {
    const auto n = static_cast<size_t>(group_->world_size());
    if (hosts.size() != n || processes.size() != n || labels.size() != n || runtime_->endpoint->wire() == nullptr)
      throw Error(ErrorKind::usage, "cross() takes the host and the process of each rank, after open_wire()");
    std::vector<Nonce> nonces;
    for (const std::string& process : processes) nonces.push_back(nonce_from(process));
    for (size_t r = 0; r < n; ++r) group_->set_label(static_cast<int>(r), std::move(labels[r]));
    group_->cross(std::move(hosts), std::move(nonces));
  }

  void start(py::function planner, py::object transfer) {
    std::shared_ptr<TransferHook> hook;
    if (!transfer.is_none()) hook = std::make_shared<PythonTransfer>(transfer.cast<py::function>());
    group_->start(planner_from(std::move(planner)), std::move(hook));
  }

  std::shared_ptr<Group>& group() { return group_; }

 private:
  std::shared_ptr<Runtime> runtime_;
  std::shared_ptr<Group> group_;
};

template <class Code>
Code code_of(const std::string& name, int n, const char* (*name_of)(Code), const char* what) {
  std::string known;
  for (int i = 0; i < n; ++i) {
    if (name == name_of(static_cast<Code>(i))) return static_cast<Code>(i);
    known += (i > 0 ? ", " : "") + std::string(name_of(static_cast<Code>(i)));
  }
  throw Error(ErrorKind::usage, std::string("there is no ") + what + " '" + name + "'; known are: " + known);
}

Call call_from(const std::string& op, const std::string& dtype, const std::string& reduce_op, int root,
               const std::vector<std::pair<uintptr_t, uint64_t>>& input,
               const std::vector<std::pair<uintptr_t, uint64_t>>& output, uint64_t count, bool uneven, double factor,
               const std::string& device, double timeout_s) {
  Call call;
  call.device = code_of<DeviceKind>(device, kDeviceKinds, device_name, "device");
  call.op = code_of<OpCode>(op, kOpCodes, op_name, "op");
  call.dtype = code_of<DType>(dtype, kDTypes, dtype_name, "dtype");
  call.reduce_op = code_of<ReduceOp>(reduce_op, kReduceOps, reduce_op_name, "reduce op");
  call.factor = factor;
  call.root = root;
  for (const auto& [address, n] : input) call.input.push_back({reinterpret_cast<std::byte*>(address), n});
  for (const auto& [address, n] : output) call.output.push_back({reinterpret_cast<std::byte*>(address), n});
  call.count = count;
  const auto extent = static_cast<int64_t>(count);
  call.shape.assign(&extent, 1);
  call.uneven = uneven;
  call.timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
  return call;
}

void raise_typed(const Error& error) {
  if (error.kind() == ErrorKind::interrupted && PyErr_Occurred() != nullptr) return;  // KeyboardInterrupt itself
  static constexpr const char* kClasses[] = {
      "",          "PeerFailedError", "MismatchError",    "AbortedError", "CommTimeoutError",
      "InitError", "ValueError",      "KeyboardInterrupt"};
  const char* name = kClasses[static_cast<int>(error.kind())];
  try {
    // Imported only now: the class of an error derives from torch's, and importing torch takes a second.
    const bool builtin = error.kind() == ErrorKind::usage || error.kind() == ErrorKind::interrupted;
    const py::object type = py::module_::import(builtin ? "builtins" : "hxcomm.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  } catch (py::error_already_set& failure) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

py::dict row_of(const std::string& group, int world_size, const std::vector<int>& hosts, const Statistic& s) {
  return py::dict(py::arg("group") = group, py::arg("world_size") = world_size, py::arg("op") = op_name(s.op),
                  py::arg("algorithm") = s.plan->algorithm, py::arg("root") = s.root,
                  py::arg("dtype") = dtype_name(s.dtype), py::arg("calls") = s.calls.load(),
                  py::arg("elements") = s.elements.load(), py::arg("item_bytes") = item_size(s.dtype),
                  py::arg("accumulation_bytes") = accumulation_size(s.dtype), py::arg("time_ns") = s.time_ns.load(),
                  py::arg("waiting_ns") = s.waiting_ns.load(),
                  py::arg("memory") = s.plan->is_private ? "staged" : "mapped", py::arg("hosts") = hosts);
}

py::list statistics_of(const Group& group) {
  py::list rows;
  for (const auto& s : group.statistics()) rows.append(row_of(group.name(), group.world_size(), group.hosts(), *s));
  return rows;
}

std::shared_ptr<Op> post(PyGroup& self, Call call) {
  const py::gil_scoped_release nogil;
  auto op = self.group()->post(std::move(call));
  self.group()->advance_in_background();
  return op;
}

void bind_making(py::class_<PyGroup>& group) {
  group
      .def(py::init([](std::shared_ptr<Runtime> runtime, std::string name, int rank, int world_size, std::string label,
                       uint64_t nonce, uint64_t first_sequence, int64_t spin_ns, bool compare_shapes,
                       std::string dump_folder, bool keep_statistics) {
             if (world_size < 1 || rank < 0 || rank >= world_size)
               throw Error(ErrorKind::usage,
                           "rank " + std::to_string(rank) + " of world size " + std::to_string(world_size));
             GroupConfig config{
                 std::move(name),        rank,           world_size, {}, nonce, first_sequence, spin_ns, compare_shapes,
                 std::move(dump_folder), keep_statistics};
             config.labels.resize(static_cast<size_t>(world_size));
             config.labels[static_cast<size_t>(rank)] = std::move(label);
             return std::make_unique<PyGroup>(std::move(runtime), std::move(config));
           }),
           py::arg("runtime"), py::kw_only(), py::arg("name"), py::arg("rank"), py::arg("world_size"), py::arg("label"),
           py::arg("nonce"), py::arg("first_sequence") = 1, py::arg("spin_ns") = -1, py::arg("compare_shapes") = false,
           py::arg("dump_folder") = "", py::arg("keep_statistics") = false)
      .def_property_readonly("rank", [](PyGroup& self) { return self.group()->rank(); })
      .def_property_readonly("world_size", [](PyGroup& self) { return self.group()->world_size(); })
      .def_property_readonly("name", [](PyGroup& self) { return self.group()->name(); })
      .def_property_readonly("control_offset", [](PyGroup& self) { return self.group()->control_offset(); })
      .def_property_readonly("next_sequence", [](PyGroup& self) { return self.group()->next_sequence(); })
      .def("connect", &PyGroup::connect, py::kw_only(), py::arg("rank"), py::arg("address"), py::arg("nonce"),
           py::arg("control_offset"), py::arg("label"), py::arg("timeout_ms"),
           "Maps the memory of a rank of this host. False where nobody listens at the address.")
      .def("cross", &PyGroup::cross, py::kw_only(), py::arg("hosts"), py::arg("processes"), py::arg("labels"),
           "The host of each rank, by number, and its process's nonce: ranks of other hosts are reached by the wire.")
      .def("start", &PyGroup::start, py::kw_only(), py::arg("planner"), py::arg("transfer") = py::none())
      .def("capsule", [](PyGroup& self) {
        return py::capsule(new std::shared_ptr<Group>(self.group()), kGroupCapsule, [](PyObject* capsule) {
          delete static_cast<std::shared_ptr<Group>*>(PyCapsule_GetPointer(capsule, kGroupCapsule));
        });
      });
}

void bind_running(py::class_<PyGroup>& group) {
  group
      .def(
          "run",
          [](PyGroup& self, const Call& call) {
            const py::gil_scoped_release nogil;
            self.group()->wait(self.group()->post(call));
          },
          py::arg("call"))
      .def(
          "post", [](PyGroup& self, const Call& call) { return post(self, call); }, py::arg("call"))
      .def(
          "wait",
          [](PyGroup& self, const std::shared_ptr<Op>& op, double timeout_s) {
            const py::gil_scoped_release nogil;
            self.group()->wait(op, timeout_s < 0 ? -1 : static_cast<int64_t>(timeout_s * 1e9));
          },
          py::arg("op"), py::arg("timeout_s") = -1.0)
      .def(
          "refuse",
          [](PyGroup& self, const Call& call, const std::string& reason) { self.group()->refuse(call, reason); },
          py::arg("call"), py::arg("reason"))
      .def(
          "abort",
          [](PyGroup& self, const std::string& reason) {
            self.group()->abort(AbortCause::called, self.group()->rank(), reason);
          },
          py::arg("reason"))
      .def("leave",
           [](PyGroup& self) {
             const py::gil_scoped_release nogil;
             self.group()->leave();
           })
      .def(
          "not_fenced",
          [](PyGroup& self, const std::vector<int>& ranks, bool tell) { return self.group()->not_fenced(ranks, tell); },
          py::arg("ranks"), py::kw_only(), py::arg("tell"),
          "Of these ranks, those of this host that may still store to this rank's memory; `tell` ends the group there.")
      .def(
          "kill", [](PyGroup& self, int rank) { self.group()->kill(rank); }, py::arg("rank"),
          "Ends the process of a rank of this host with SIGKILL.")
      .def("is_alive", [](PyGroup& self) { return self.group()->alive(); })
      .def(
          "death_of",
          [](PyGroup& self, int rank) {
            if (rank < 0 || rank >= self.group()->world_size())
              throw Error(ErrorKind::usage, "there is no rank " + std::to_string(rank));
            return self.group()->death_of(rank);
          },
          py::arg("rank"), "What ended this rank's process, once that is known; else the empty string.")
      .def("statistics", [](PyGroup& self) { return statistics_of(*self.group()); });
}

void bind_floors(py::class_<PyGroup>& group) {
  group
      .def(
          "floor_all_reduce",
          [](PyGroup& self, uint64_t nbytes, const std::string& dtype, int iterations, bool touched,
             const std::string& device) {
            const DType code = code_of<DType>(dtype, kDTypes, dtype_name, "dtype");
            const auto where = code_of<DeviceKind>(device, kDeviceKinds, device_name, "device");
            const py::gil_scoped_release nogil;
            return Floor::all_reduce_seconds(*self.group(), nbytes, code, iterations, touched, where);
          },
          py::kw_only(), py::arg("nbytes"), py::arg("dtype"), py::arg("iterations"), py::arg("touched"),
          py::arg("device") = "cpu")
      .def(
          "floor_hand_over",
          [](PyGroup& self, int iterations) {
            const py::gil_scoped_release nogil;
            return Floor::hand_over_seconds(*self.group(), iterations);
          },
          py::kw_only(), py::arg("iterations"));
}

void bind_runtime(py::module_& m) {
  py::class_<Runtime, std::shared_ptr<Runtime>> runtime(m, "Runtime",
                                                        "This process's shared segment, peers and threads.");
  bind_wire(runtime);
  bind_notes(runtime);
  runtime
      .def(py::init<size_t, int, size_t>(), py::arg("segment_bytes"), py::arg("chips") = 0,
           py::arg("bytes_per_chip") = 0)
      .def_property_readonly("chips", [](const Runtime& r) { return r.memory.chips; })
      .def(
          "memory", [](const Runtime& r) { return py::capsule(&r.memory, kMemoryCapsule); },
          "The table of functions over the chips' memory for hxcomm._C.")
      .def_property_readonly("address", [](const Runtime& r) { return r.endpoint->address(); })
      .def_property_readonly("nonce",
                             [](const Runtime& r) {
                               return py::bytes(reinterpret_cast<const char*>(r.endpoint->nonce().data()),
                                                r.endpoint->nonce().size());
                             })
      .def(
          "keep_forever", [](const std::shared_ptr<Runtime>& r) { new std::shared_ptr<Runtime>(r); },
          "Never ends its threads: for the process's own, which must outlive whatever Python tears down at exit.")
      .def(
          "stop_background",
          [](const Runtime& r) {
            const py::gil_scoped_release nogil;
            r.progress->stop_background();
          },
          "Before the interpreter ends: a thread that then drops a Python object ends the process with SIGABRT.")
      .def(
          "allocate",
          [](const Runtime& r, size_t nbytes) {
            auto& segment = r.endpoint->segment();
            return reinterpret_cast<uintptr_t>(segment.base() + segment.allocate(nbytes));
          },
          py::arg("nbytes"), "The address of zeroed pages in the segment: memory of device hx, which peers reach.")
      .def(
          "trace_call_sites",
          [](const Runtime& r, std::vector<std::string> outside) {
            r.progress->call_site = [outside = std::move(outside)](char* text, size_t size) {
              write_call_site(text, size, outside);
            };
          },
          py::arg("outside"), "Records where each call stands in the program; files that begin so are not the program.")
      .def("statistics",
           [](const Runtime& r) {
             py::list rows;
             for (const auto& group : r.progress->groups())
               if (!group->has_left()) rows += statistics_of(*group);
             return rows;
           })
      .def("past_statistics",
           [](const Runtime& r) {
             py::list rows;
             for (const auto& past : r.progress->past())
               rows.append(row_of(past.group, past.world_size, past.hosts, *past.statistic));
             return rows;
           })
      .def_property_readonly("allocated_bytes",
                             [](const Runtime& r) { return r.endpoint->segment().allocated_bytes(); });
}

void bind_plans(py::module_& m) {
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "One rank's compiled schedule (hxcomm/schedule/plan.py).")
      .def(py::init([](std::vector<int32_t> words, uint64_t hash, std::string algorithm) {
             return std::make_shared<Plan>(Plan::decode(std::move(words), hash, std::move(algorithm)));
           }),
           py::arg("words"), py::arg("hash"), py::arg("algorithm"))
      .def_readonly("hash", &Plan::hash)
      .def_readonly("algorithm", &Plan::algorithm)
      .def_readonly("words", &Plan::words);
  py::class_<Call>(m, "Call", "One collective call on raw memory: blocks are (address, elements).")
      .def(py::init(&call_from), py::kw_only(), py::arg("op"), py::arg("dtype"), py::arg("reduce_op") = "sum",
           py::arg("root") = -1, py::arg("input"), py::arg("output"), py::arg("count"), py::arg("uneven") = false,
           py::arg("factor") = 1.0, py::arg("device") = "cpu", py::arg("timeout_s") = 600.0);
  py::class_<Op, std::shared_ptr<Op>>(m, "Op", "A posted collective. Keep its buffers alive until it has finished.")
      .def("is_finished", [](const Op& op) { return op.finished.load(std::memory_order_acquire); });
}

}  // namespace
}  // namespace hxcomm

PYBIND11_MODULE(_core, m) {
  using namespace hxcomm;
  m.doc() = "hxcomm's communicator: segments, groups, plans and the executor. Knows nothing of torch.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      raise_typed(error);
    }
  });
  bind_runtime(m);
  bind_plans(m);
  bind_simulation(m);
  py::class_<PyGroup> group(m, "Group", "A group of ranks that run collectives together.");
  bind_making(group);
  bind_running(group);
  bind_floors(group);
  m.def(
      "copy_seconds",
      [](size_t nbytes, int iterations) {
        const py::gil_scoped_release nogil;
        return copy_seconds(nbytes, iterations);
      },
      py::kw_only(), py::arg("nbytes"), py::arg("iterations"), "Seconds that memcpy takes for so many bytes.");
  m.def("api", [] { return py::capsule(api(), kApiCapsule); }, "The table of functions for hxcomm._C.");
  m.def(
      "set_reduce_isa",
      [](const std::string& name) {
        set_reduce_isa(name == "scalar" ? Isa::scalar : name == "avx2" ? Isa::avx2 : Isa::automatic);
      },
      py::arg("isa"), "Chooses the reduce kernels: auto, avx2 or scalar. Before the first group only.");
  m.def("arm_failpoint", &arm_failpoint, py::arg("text"),
        "For tests: HXCOMM_FAILPOINT's value, e.g. \"judged@2=kill\". Before the first group only.");
  m.def("reduce_isa", &reduce_isa, "The instruction set of the reduce kernels in use: avx2 or scalar.");
  m.attr("PROTOCOL_VERSION") = kProtocolVersion;
}
