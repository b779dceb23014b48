// Fills the call of each collective from a front end's tensors. One place for all front ends: c10d's process group and
// the TorchComms communicator differ in how they name and pass things, not in what a call may be.
#pragma once

#include <vector>

#include "torch/tensors.h"

namespace hxcomm::torch_glue {

using List = std::vector<at::Tensor>;

// The only tensor, or list of them, of what c10d passes: lists from the time of one process with many GPUs. Undefined
// or empty where there is not exactly one, which is then noted in the call.
const at::Tensor& only(const List& tensors, Tensors& call);
const List& only(const std::vector<List>& lists, Tensors& call);

// Who fills the call.
struct Member {
  int rank, size;
};

// A problem (wrong list length, counts that do not fit, an unknown reduce op, a root that does not exist) is noted in
// the call: see Tensors::problem().
void fill_all_reduce(Tensors& call, const at::Tensor& tensor, const c10d::ReduceOp& op);
void fill_broadcast(Tensors& call, const at::Tensor& tensor, int64_t root, Member self);
void fill_reduce(Tensors& call, const at::Tensor& tensor, int64_t root, const c10d::ReduceOp& op, Member self);
void fill_all_gather(Tensors& call, const at::Tensor& output, const at::Tensor& input, Member self);
// The outputs may have different sizes, if every rank passes alike ones.
void fill_all_gather(Tensors& call, const List& outputs, const at::Tensor& input, Member self);
// `outputs` is null where the caller passed none, as all ranks but the root must.
void fill_gather(Tensors& call, const List* outputs, const at::Tensor& input, int64_t root, Member self);
// The output, of the root only, has room for all.
void fill_gather(Tensors& call, const at::Tensor& output, const at::Tensor& input, int64_t root, Member self);
void fill_scatter(Tensors& call, const at::Tensor& output, const List* inputs, int64_t root, Member self);
void fill_reduce_scatter(Tensors& call, const at::Tensor& output, const at::Tensor& input, const c10d::ReduceOp& op,
                         Member self);
// The inputs may have different sizes, if every rank passes alike ones.
void fill_reduce_scatter(Tensors& call, const at::Tensor& output, const List& inputs, const c10d::ReduceOp& op,
                         Member self);
// Splits count rows of the first dimension; empty: equal parts.
void fill_all_to_all(Tensors& call, const at::Tensor& output, const at::Tensor& input,
                     const std::vector<int64_t>& output_splits, const std::vector<int64_t>& input_splits, Member self);
void fill_all_to_all(Tensors& call, const List& outputs, const List& inputs, Member self);
void fill_send(Tensors& call, const at::Tensor& tensor, int peer, int tag, Member self);
void fill_recv(Tensors& call, const at::Tensor& tensor, int peer, int tag, Member self);
void fill_recv_from_any(Tensors& call, const at::Tensor& tensor, int tag);

}  // namespace hxcomm::torch_glue
