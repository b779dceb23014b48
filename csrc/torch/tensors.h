// Tensors of one collective call, checked and laid out as the communicator takes them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <string>
#include <utility>
#include <vector>

#include "communicator/api.h"

namespace hxcomm::torch_glue {

enum Op : int { kAllReduce, kBroadcast, kReduce, kAllGather, kReduceScatter, kGather, kScatter, kAllToAll, kBarrier };

constexpr int kNoReduceOp = 0;  // what ops that do not reduce carry: SUM, ignored by the fingerprint

// The communicator's code of a torch dtype or reduce op; -1 where it has none.
int dtype_code(at::ScalarType type);
int reduce_op_code(const c10d::ReduceOp& op);

// One call: its memory, and what keeps it alive. Non-contiguous tensors get a contiguous temporary of their own, which
// is filled before the call (inputs) and copied back after it (outputs), so that peers never see strides.
class Tensors {
 public:
  Tensors(int op, const char* name) : name_(name) {
    call_.op = op;
    call_.root = -1;
  }

  void set_root(int64_t root, int size);
  void set_reduce_op(const c10d::ReduceOp& op, const Api& api);
  // Adds memory to the call, in the order of the op's blocks. A tensor may be given as `blocks` equal blocks.
  void add_input(const at::Tensor& tensor, int blocks = 1);
  void add_output(const at::Tensor& tensor, int blocks = 1);
  void add_in_place(const at::Tensor& tensor, bool written);
  // Blocks of unequal sizes: rows of the first dimension, as all_to_all_single counts them.
  void add_input_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows);
  void add_output_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows);

  void set_uneven() { call_.uneven = 1; }

  // Checked after all is added; what is wrong first, or "".
  const std::string& problem() const { return problem_; }
  void fail(const std::string& problem) {
    if (problem_.empty()) problem_ = std::string(name_) + ": " + problem;
  }
  void require_count(int64_t count);  // every block so far has this many elements

  ApiCall call(std::chrono::milliseconds timeout);
  void copy_back();
  std::vector<at::Tensor> outputs() const { return {results_.begin(), results_.end()}; }

 private:
  // In place up to what an all_reduce needs: four allocations less are 0.2 us of a call.
  using Blocks = c10::SmallVector<ApiBlock, 2>;
  at::Tensor contiguous(const at::Tensor& tensor, bool read, bool written);
  void check(const at::Tensor& tensor);
  void add_blocks(Blocks& to, const at::Tensor& tensor, int blocks);
  void add_rows(Blocks& to, const at::Tensor& tensor, const std::vector<int64_t>& rows);

  const char* name_;
  std::string problem_;
  ApiCall call_{};
  bool has_dtype_ = false;
  at::ScalarType type_ = at::ScalarType::Byte;
  Blocks input_, output_;
  c10::IntArrayRef shape_;  // of the first tensor, which kept_ holds
  c10::SmallVector<at::Tensor, 2> kept_;
  c10::SmallVector<at::Tensor, 2> results_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // user's, ours
};

}  // namespace hxcomm::torch_glue
