// Tensors of one collective call, checked and laid out as the communicator takes them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "communicator/api.h"

namespace hxcomm::torch_glue {

enum Op : int {
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGather,
  kReduceScatter,
  kGather,
  kScatter,
  kAllToAll,
  kBarrier,
  kSend,
  kRecv,
  kPut,
  kSignal,
  kWaitSignal
};

// The communicator's codes of a torch dtype or reduce op, where it has one.
std::optional<DType> dtype_of(at::ScalarType type);
std::optional<ReduceOp> reduce_op_of(const c10d::ReduceOp& op);

// One call: its memory, and what keeps it alive. Non-contiguous tensors get a contiguous temporary of their own, which
// is filled before the call (inputs) and copied back after it (outputs), so that peers never see strides.
class Tensors {
 public:
  Tensors(int op, const char* name) : name_(name) {
    call_.op = op;
    call_.root = -1;
    call_.factor = 1;
  }

  void set_root(int64_t root, int size);
  void set_peer(int peer, int tag, int size);  // of a send or recv
  void set_any_peer(int tag) { call_.tag = tag; }
  void set_window(uint64_t id, int64_t offset);           // of put, signal, wait_signal
  void set_hints(int32_t hints) { call_.hints = hints; }  // see ApiCall
  void set_reduce_op(const c10d::ReduceOp& op);
  // Adds memory to the call, in the order of the op's blocks. A tensor may be given as `blocks` equal blocks.
  void add_input(const at::Tensor& tensor, int blocks = 1);
  void add_output(const at::Tensor& tensor, int blocks = 1);
  void add_in_place(const at::Tensor& tensor, bool written);
  void add_input_for_each(const at::Tensor& tensor, int ranks);  // the whole of it as every rank's block
  // Blocks of unequal sizes: rows of the first dimension, as all_to_all_single counts them.
  void add_input_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows);
  void add_output_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows);

  // An all_to_all whose blocks may differ in size by pair of ranks, a reduce_scatter whose blocks differ by rank.
  void set_uneven() { call_.uneven = 1; }
  void make_all_to_all() {  // of that kind
    call_.op = kAllToAll;
    set_uneven();
  }

  // Checked after all is added; what is wrong first, or "".
  const std::string& problem() const { return problem_; }
  void fail(const std::string& problem) {
    if (problem_.empty()) problem_ = std::string(name_) + ": " + problem;
  }
  void require_count(int64_t count);  // every block so far has this many elements

  ApiCall call(std::chrono::milliseconds timeout) const;
  // Fills what stood behind temporaries. Throws what torch throws.
  void copy_back();
  const char* name() const { return name_; }
  bool is_hx() const { return call_.device == static_cast<int>(DeviceKind::hx); }
  void keep_forever() const noexcept;  // the memory that peers see
  // What the profiler shows the shapes of: inputs; of a recv, which has none, what it receives into.
  c10::ArrayRef<at::Tensor> shown() const { return call_.op == kRecv ? results_ : read_; }
  std::vector<at::Tensor> outputs() const { return {results_.begin(), results_.end()}; }

 private:
  // In place up to what an all_reduce needs: four allocations less in the call that is made most often.
  using Blocks = c10::SmallVector<ApiBlock, 2>;
  at::Tensor contiguous(const at::Tensor& tensor, bool read, bool written);
  void check(const at::Tensor& tensor);
  void set_factor(const c10d::ReduceOp& op);
  void add_blocks(Blocks& to, const at::Tensor& tensor, int blocks);
  void add_rows(Blocks& to, const at::Tensor& tensor, const std::vector<int64_t>& rows);

  const char* name_;
  std::string problem_;
  ApiCall call_{};
  bool has_dtype_ = false;
  at::ScalarType type_ = at::ScalarType::Byte;
  Blocks input_, output_;
  c10::IntArrayRef shape_;                                 // of the first tensor, which read_ or results_ hold
  c10::SmallVector<at::Tensor, 2> read_;                   // as peers see them, contiguous
  c10::SmallVector<at::Tensor, 2> results_;                // as the user has them
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // user's, ours
};

}  // namespace hxcomm::torch_glue
