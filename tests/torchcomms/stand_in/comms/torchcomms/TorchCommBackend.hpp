// What a C++ backend of torchcomms is built against: the interface of its plug-ins, written down for tests, in as much
// as hxcomm's plug-in uses it. Names, types and virtual functions are torchcomms'; nothing here is its code.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <unordered_map>
#include <unordered_set>
#include <variant>
#include <vector>

namespace torch::comms {

constexpr std::chrono::milliseconds kDefaultTimeout = std::chrono::seconds(600);
constexpr std::chrono::milliseconds kNoTimeout = std::chrono::milliseconds(0);
using InitHandle = std::string;
using Hints = std::unordered_map<std::string, std::string>;
using PreMulSumFactorT = std::variant<at::Tensor, double>;

class ReduceOp {
 public:
  enum class RedOpType { SUM = 0, PRODUCT, MIN, MAX, BAND, BOR, BXOR, PREMUL_SUM, AVG };
  explicit ReduceOp(RedOpType type, std::optional<PreMulSumFactorT> factor = std::nullopt)
      : type_(type), factor_(std::move(factor)) {}
  RedOpType type() const { return type_; }
  const std::optional<PreMulSumFactorT>& factor() const { return factor_; }

 private:
  RedOpType type_;
  std::optional<PreMulSumFactorT> factor_;
};

struct OptionsBase {
  Hints hints;
  std::chrono::milliseconds timeout{kNoTimeout};
};
struct SendOptions : OptionsBase {};
struct RecvOptions : OptionsBase {};
struct BatchP2POptions : OptionsBase {};
struct BroadcastOptions : OptionsBase {};
struct AllReduceOptions : OptionsBase {};
struct ReduceOptions : OptionsBase {};
struct AllGatherOptions : OptionsBase {};
struct AllGatherSingleOptions : OptionsBase {};
struct ReduceScatterOptions : OptionsBase {};
struct ReduceScatterSingleOptions : OptionsBase {};
struct AllToAllOptions : OptionsBase {};
struct AllToAllSingleOptions : OptionsBase {};
struct AllToAllvSingleOptions : OptionsBase {};
struct BarrierOptions : OptionsBase {};
struct ScatterOptions : OptionsBase {};
struct GatherOptions : OptionsBase {};
struct GatherSingleOptions : OptionsBase {};

struct CommOptions {
  bool abort_process_on_timeout_or_error{true};
  std::chrono::milliseconds timeout{kDefaultTimeout};
  c10::intrusive_ptr<c10d::Store> store{nullptr};
  bool enable_reconfigure{false};
  Hints hints;
};

struct ReconfigureOptions {
  int64_t uuid{0};
  std::variant<std::unordered_set<InitHandle>, std::vector<InitHandle>> handles;
  std::optional<std::chrono::milliseconds> timeout;
  Hints hints;
};

class TorchWork : public c10::intrusive_ptr_target {
 public:
  enum class WorkStatus { NOT_STARTED, INPROGRESS, COMPLETED, TIMEDOUT, ERROR };
  WorkStatus status() const { return status_; }
  virtual void wait() = 0;

 protected:
  void setStatus(WorkStatus status) { status_ = status; }

 private:
  std::atomic<WorkStatus> status_{WorkStatus::NOT_STARTED};
};

class TorchWorkCompleted : public TorchWork {
 public:
  TorchWorkCompleted() { setStatus(WorkStatus::COMPLETED); }
  void wait() override {}
};

class BatchSendRecv {
 public:
  struct P2POp {
    enum class OpType { SEND, RECV };
    OpType type;
    at::Tensor tensor;
    int peer;
  };
};

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<TorchWork>;

class TorchCommBackend {
 public:
  virtual ~TorchCommBackend() = default;
  virtual void init(at::Device, const std::string&, const CommOptions& = {}) = 0;
  virtual void finalize() = 0;
  virtual int getRank() const = 0;
  virtual int getSize() const = 0;
  virtual std::string_view getBackendName() const = 0;
  virtual std::string_view getBackendVersion() const = 0;
  virtual std::string_view getCommName() const = 0;
  virtual const CommOptions& getOptions() const = 0;
  virtual const at::Device& getDevice() const = 0;
  virtual WorkPtr send(const at::Tensor&, int, bool, const SendOptions& = {}) = 0;
  virtual WorkPtr recv(at::Tensor&, int, bool, const RecvOptions& = {}) = 0;
  virtual WorkPtr batch_op_issue(const std::vector<BatchSendRecv::P2POp>&, bool, const BatchP2POptions& = {}) = 0;
  virtual WorkPtr broadcast(at::Tensor&, int, bool, const BroadcastOptions& = {}) = 0;
  virtual WorkPtr all_reduce(at::Tensor&, const ReduceOp&, bool, const AllReduceOptions& = {}) = 0;
  virtual WorkPtr reduce(const at::Tensor&, int, const ReduceOp&, bool, const ReduceOptions& = {}) = 0;
  virtual WorkPtr all_gather(const Tensors&, const at::Tensor&, bool, const AllGatherOptions& = {}) = 0;
  virtual WorkPtr all_gather_v(const Tensors&, const at::Tensor&, bool, const AllGatherOptions& = {}) = 0;
  virtual WorkPtr all_gather_single(at::Tensor&, const at::Tensor&, bool, const AllGatherSingleOptions& = {}) = 0;
  virtual WorkPtr reduce_scatter(at::Tensor&, const Tensors&, const ReduceOp&, bool,
                                 const ReduceScatterOptions& = {}) = 0;
  virtual WorkPtr reduce_scatter_v(at::Tensor&, const Tensors&, const ReduceOp&, bool,
                                   const ReduceScatterOptions& = {}) = 0;
  virtual WorkPtr reduce_scatter_single(at::Tensor&, const at::Tensor&, const ReduceOp&, bool,
                                        const ReduceScatterSingleOptions& = {}) = 0;
  virtual WorkPtr all_to_all_single(at::Tensor&, const at::Tensor&, bool, const AllToAllSingleOptions& = {}) = 0;
  virtual WorkPtr all_to_all_v_single(at::Tensor&, const at::Tensor&, const std::vector<uint64_t>&,
                                      const std::vector<uint64_t>&, bool, const AllToAllvSingleOptions& = {}) = 0;
  virtual WorkPtr all_to_all(const Tensors&, const Tensors&, bool, const AllToAllOptions& = {}) = 0;
  virtual WorkPtr barrier(bool, const BarrierOptions& = {}) = 0;
  virtual WorkPtr scatter(at::Tensor&, const Tensors&, int, bool, const ScatterOptions& = {}) = 0;
  virtual WorkPtr gather(const Tensors&, const at::Tensor&, int, bool, const GatherOptions& = {}) = 0;
  virtual WorkPtr gather_single(at::Tensor&, const at::Tensor&, int, bool, const GatherSingleOptions& = {}) = 0;
  virtual std::shared_ptr<TorchCommBackend> split(const std::vector<int>&, const std::string&,
                                                  const CommOptions& = {}) = 0;
  virtual bool supportsReconfigure() const { return false; }
  virtual InitHandle getInitHandle() const = 0;
  virtual WorkPtr reconfigure(const ReconfigureOptions&) = 0;
  virtual void abort() = 0;
};

}  // namespace torch::comms
