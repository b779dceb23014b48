#include "torch/calls.h"

#include <algorithm>

namespace hxcomm::torch_glue {
namespace {

int64_t elements_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.numel() : 0; }

bool all_equal(const List& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const auto& each) { return elements_of(each) == elements_of(tensors[0]); });
}

void add_one_per_rank(Tensors& call, const List& tensors, bool output, Member self) {
  if (tensors.size() != static_cast<size_t>(self.size))
    return call.fail("a list of " + std::to_string(tensors.size()) + " tensors, but the group has " +
                     std::to_string(self.size) + " ranks");
  for (const at::Tensor& tensor : tensors) output ? call.add_output(tensor) : call.add_input(tensor);
}

// Where the blocks of a list differ in size, this rank's own must be as long as its other tensor.
void require_own(Tensors& call, const List& list, const char* of_list, const at::Tensor& tensor, const char* of_tensor,
                 Member self) {
  const auto own = static_cast<size_t>(self.rank);
  if (own < list.size() && elements_of(list[own]) != elements_of(tensor))
    call.fail("this is rank " + std::to_string(own) + " with an " + of_tensor + " of " +
              std::to_string(elements_of(tensor)) + " elements, but " + of_list + " " + std::to_string(own) + " has " +
              std::to_string(elements_of(list[own])));
}

std::vector<int64_t> rows(Tensors& call, const std::vector<int64_t>& splits, const at::Tensor& tensor, Member self) {
  if (!splits.empty() && splits.size() != static_cast<size_t>(self.size))
    call.fail(std::to_string(splits.size()) + " split sizes, but the group has " + std::to_string(self.size) +
              " ranks");
  if (!splits.empty() || !tensor.defined()) return splits;
  const int64_t first = tensor.dim() == 0 ? 1 : tensor.size(0);
  if (first % self.size != 0)
    call.fail("a first dimension of " + std::to_string(first) + " is not divisible by " + std::to_string(self.size) +
              " ranks, and no split sizes were given");
  return std::vector<int64_t>(static_cast<size_t>(self.size), first / self.size);
}

}  // namespace

const at::Tensor& only(const List& tensors, Tensors& call) {
  static const at::Tensor undefined;
  if (tensors.size() == 1) return tensors[0];
  call.fail("takes one tensor per process, not " + std::to_string(tensors.size()));
  return undefined;
}

const List& only(const std::vector<List>& lists, Tensors& call) {
  static const List empty;
  if (lists.size() == 1) return lists[0];
  call.fail("takes one list of tensors per process, not " + std::to_string(lists.size()));
  return empty;
}

void fill_all_reduce(Tensors& call, const at::Tensor& tensor, const c10d::ReduceOp& op) {
  call.add_in_place(tensor, /*written=*/true);
  call.set_reduce_op(op);
  call.require_count(elements_of(tensor));
}

void fill_broadcast(Tensors& call, const at::Tensor& tensor, int64_t root, Member self) {
  call.set_root(root, self.size);
  call.add_in_place(tensor, /*written=*/root != self.rank);
  call.require_count(elements_of(tensor));
}

void fill_reduce(Tensors& call, const at::Tensor& tensor, int64_t root, const c10d::ReduceOp& op, Member self) {
  call.set_root(root, self.size);
  call.add_in_place(tensor, /*written=*/root == self.rank);
  call.set_reduce_op(op);
  call.require_count(elements_of(tensor));
}

void fill_all_gather(Tensors& call, const at::Tensor& output, const at::Tensor& input, Member self) {
  call.add_input(input);
  call.add_output(output, self.size);
  call.require_count(elements_of(input));
}

void fill_all_gather(Tensors& call, const List& outputs, const at::Tensor& input, Member self) {
  if (all_equal(outputs)) {
    call.add_input(input);
    add_one_per_rank(call, outputs, /*output=*/true, self);
    call.require_count(elements_of(input));
    return;
  }
  // Where ranks contribute unequal tensors, each sends its own to everybody: an all_to_all, whose pairs may differ.
  call.make_all_to_all();
  call.add_input_for_each(input, self.size);
  add_one_per_rank(call, outputs, /*output=*/true, self);
  require_own(call, outputs, "output", input, "input", self);
}

void fill_gather(Tensors& call, const List* outputs, const at::Tensor& input, int64_t root, Member self) {
  call.set_root(root, self.size);
  call.add_input(input);
  if (root == self.rank)
    add_one_per_rank(call, outputs != nullptr ? *outputs : List(), /*output=*/true, self);
  else if (outputs != nullptr)
    call.fail("only the root takes a list of outputs");
  call.require_count(elements_of(input));
}

void fill_gather(Tensors& call, const at::Tensor& output, const at::Tensor& input, int64_t root, Member self) {
  call.set_root(root, self.size);
  call.add_input(input);
  if (root == self.rank) call.add_output(output, self.size);
  call.require_count(elements_of(input));
}

void fill_scatter(Tensors& call, const at::Tensor& output, const List* inputs, int64_t root, Member self) {
  call.set_root(root, self.size);
  call.add_output(output);
  if (root == self.rank)
    add_one_per_rank(call, inputs != nullptr ? *inputs : List(), /*output=*/false, self);
  else if (inputs != nullptr)
    call.fail("only the root takes a list of inputs");
  call.require_count(elements_of(output));
}

void fill_reduce_scatter(Tensors& call, const at::Tensor& output, const at::Tensor& input, const c10d::ReduceOp& op,
                         Member self) {
  call.add_output(output);
  call.add_input(input, self.size);
  call.set_reduce_op(op);
  call.require_count(elements_of(output));
}

void fill_reduce_scatter(Tensors& call, const at::Tensor& output, const List& inputs, const c10d::ReduceOp& op,
                         Member self) {
  call.add_output(output);
  add_one_per_rank(call, inputs, /*output=*/false, self);
  call.set_reduce_op(op);
  // Equal parts are the common case, whose count the fingerprint holds: a rank with unequal ones is a mismatch to them.
  if (all_equal(inputs)) return call.require_count(elements_of(output));
  call.set_uneven();
  require_own(call, inputs, "input", output, "output", self);
}

void fill_all_to_all(Tensors& call, const at::Tensor& output, const at::Tensor& input,
                     const std::vector<int64_t>& output_splits, const std::vector<int64_t>& input_splits, Member self) {
  // One rank may give splits where another leaves them out, so equal and unequal splits are one op: counts are
  // compared pair by pair.
  call.add_input_rows(input, rows(call, input_splits, input, self));
  call.add_output_rows(output, rows(call, output_splits, output, self));
  call.set_uneven();
}

void fill_all_to_all(Tensors& call, const List& outputs, const List& inputs, Member self) {
  add_one_per_rank(call, inputs, /*output=*/false, self);
  add_one_per_rank(call, outputs, /*output=*/true, self);
  call.set_uneven();
}

void fill_send(Tensors& call, const at::Tensor& tensor, int peer, int tag, Member self) {
  call.set_peer(peer, tag, self.size);
  call.add_input(tensor);
  call.require_count(elements_of(tensor));
}

void fill_recv(Tensors& call, const at::Tensor& tensor, int peer, int tag, Member self) {
  call.set_peer(peer, tag, self.size);
  call.add_output(tensor);
  call.require_count(elements_of(tensor));
}

void fill_recv_from_any(Tensors& call, const at::Tensor& tensor, int tag) {
  call.set_any_peer(tag);
  call.add_output(tensor);
  call.require_count(elements_of(tensor));
}

}  // namespace hxcomm::torch_glue
