// Unit test of Plan::decode: a plan written by hand is understood, and each kind of wrong word is refused by its index.
// tests/core/test_plan.py holds it against the compiler's plans and random words; this one needs no Python.
#include "core/plan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "core/line.h"
#include "tests/expect.h"
#include "tests/staged_plan.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

using Words = std::vector<int32_t>;
using Code = Instruction::Code;

Plan decode(Words words) { return Plan::decode(std::move(words), 7, "mine"); }

// The words are refused, and the message names the algorithm, the index of the wrong word, and what is wrong with it.
void refused(const Words& words, size_t index, const std::string& what,
             const std::source_location where = std::source_location::current()) {
  const std::string place = "at word " + std::to_string(index) + ": ";
  expect_error(ErrorKind::usage, {"'mine'", place, what}, [&] { decode(words); }, where);
}

Words with(size_t index, int32_t value) {
  Words words = staged_all_reduce(0);
  words[index] = value;
  return words;
}

// The header of the plan, and other instructions.
Words with_body(std::initializer_list<int32_t> body) {
  Words words = staged_all_reduce(0);
  words.resize(kStageWord);
  words.insert(words.end(), body);
  return words;
}

void a_plan_is_decoded_field_by_field() {
  const Words words = staged_all_reduce(1);
  expect(words.size() == kEndWord + 1, "the words that staged_plan.h says it has");
  const Plan plan = decode(words);
  expect(plan.world_size == 2 && plan.rank == 1, "rank 1 of 2");
  expect(plan.input.blocks == 1 && plan.input.pieces == 2, "an input of 1 block in 2 pieces");
  expect(plan.output.blocks == 1 && plan.output.pieces == 2, "an output of 1 block in 2 pieces");
  expect(plan.scratch_chunks == 2, "2 scratch chunks");
  expect(plan.is_private && !plan.in_place && !plan.partials, "the flag private alone");
  expect(plan.input_blocks == Words({0, 1}) && plan.output_blocks == Words({0, 1}),
         "one own block of each buffer used");
  expect(plan.hash == 7 && plan.algorithm == "mine" && plan.words == words, "what decode() was given, kept");

  const Code codes[] = {Code::transfer, Code::enter,    Code::transfer, Code::publish,
                        Code::wait,     Code::transfer, Code::end};
  expect(plan.instructions.size() == std::size(codes), "7 instructions");
  for (size_t i = 0; i < std::size(codes); ++i)
    expect(plan.instructions[i].code == codes[i], "the code of instruction " + std::to_string(i));
  const Instruction& reduce = plan.instructions[2];
  expect(reduce.reduce && reduce.final && reduce.n_sources == 2 && reduce.n_destinations == 2, "a final reduction");
  expect(reduce.count_buffer == BufferKind::output && reduce.count_chunk == 1, "the count of output chunk 1");
  expect(plan.instructions[4].peer == 0 && plan.instructions[4].round == 1, "a wait for round 1 of rank 0");
  expect(plan.operands.size() == 8, "the operands of all transfers in a row");
  const Operand& staged = plan.operands[reduce.first_operand + 1];
  expect(staged.rank == 0 && staged.buffer == BufferKind::scratch && staged.chunk == 0 && staged.mark == Mark::fresh,
         "rank 0's scratch chunk 0 as the second source");
}

void each_header_word_is_refused_by_its_index() {
  refused(with(0, 0x48585032), 0, "the magic number is 1213747250");
  refused(with(1, 3), 1, "the plan version is 3");
  refused(with(2, 0), 2, "the world size is 0");
  refused(with(3, 2), 3, "the rank is 2, allowed are 0 to 1");
  refused(with(3, -1), 3, "the rank is -1");
  refused(with(4, 0), 4, "the number of rounds is 0");
  refused(with(4, static_cast<int32_t>(kMaxRounds) + 1), 4, "the number of rounds is 65535");
  refused(with(5, -1), 5, "the number of blocks is -1");
  refused(with(6, 0), 6, "the number of pieces is 0");
  refused(with(9, -1), 9, "the number of scratch chunks is -1");
  refused(with(10, 32), 10, "the flags is 32");
  refused(with(15, 1), 15, "the number of messages is 1, allowed are 0 to 0");  // it does not cross hosts
  Words many = with(5, 1 << 20);
  many[6] = 1 << 20;
  refused(many, 6, "more than 2^31 chunks");
}

void each_word_of_an_instruction_is_refused_by_its_index() {
  refused(with(kStageWord, 5), kStageWord, "an instruction's code is 5");
  refused(with(kStageWord, -1), kStageWord, "an instruction's code is -1");
  refused(with(kStageWord + 1, 2), kStageWord + 1, "reduce is 2");
  refused(with(kStageWord + 2, -1), kStageWord + 2, "final is -1");
  refused(with(kStageWord + 3, kScratch), kStageWord + 3, "a count's buffer is 2");
  refused(with(kStageWord + 4, 2), kStageWord + 4, "a count's chunk is 2, allowed are 0 to 1");
  refused(with(kStageWord + 5, 2), kStageWord + 5, "the number of sources is 2, allowed are 1 to 1");  // a copy
  refused(with(kReduceWord + 5, 0), kReduceWord + 5, "the number of sources is 0");
  refused(with(kReduceWord + 6, 1 << 16), kReduceWord + 6, "the number of destinations is 65536");
  const size_t location = kReduceWord + 11;  // the second source
  refused(with(location, 2), location, "a location's rank is 2");
  refused(with(location + 1, 3), location + 1, "a location's buffer is 3");
  refused(with(location + 2, 2), location + 2, "a location's chunk is 2, allowed are 0 to 1");
  refused(with(location + 2, std::numeric_limits<int32_t>::min()), location + 2, "a location's chunk is -2147483648");
  refused(with(location + 3, 3), location + 3, "a location's mark is 3");
  refused(with(kPublishWord + 1, 0), kPublishWord + 1, "a published round is 0, allowed are 1 to 2");
  refused(with(kWaitWord + 1, 2), kWaitWord + 1, "a wait's peer is 2");
  refused(with(kWaitWord + 2, 3), kWaitWord + 2, "a wait's round is 3, allowed are 1 to 2");
}

void a_plan_cut_short_is_refused_where_it_ends() {
  const Words whole = staged_all_reduce(0);
  for (size_t length = 0; length < whole.size(); ++length)
    refused(Words(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length)), length,
            "ends in the middle of an instruction");
}

// Of two ranks on two hosts, broadcast from rank 0: it sends its input, rank 1 stores what it receives.
Words across_hosts(int32_t rank) {
  Words words{0x48585031, 2, 2, rank, 2, 1, 1, 1, 1, 0, 1 | 2 | 16, 0, 16, 0, 1, 1};
  const Words body = rank == 0 ? Words{2, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 3, 0, 0, 6, 0}
                               : Words{2, 5, 0, 0, 6, 1, 0, 0, 1, 0, 1, 1, 1, 3, 0, 0, 1, 1, 0, 0, 0};
  words.insert(words.end(), body.begin(), body.end());
  return words;
}

Words across_hosts(int32_t rank, size_t word, int32_t value) {
  Words words = across_hosts(rank);
  words[word] = value;
  return words;
}

void a_plan_across_hosts_sends_receives_and_agrees_once() {
  const Plan sender = Plan::decode(across_hosts(0), 7, "mine");
  expect(sender.crosses && sender.messages == 1, "one message across hosts");
  expect(sender.instructions[1].sends && !sender.instructions[1].stores, "a transfer that sends");
  const Plan receiver = Plan::decode(across_hosts(1), 7, "mine");
  expect(receiver.instructions[1].code == Code::receive && receiver.instructions[1].peer == 0, "a receive from rank 0");
  expect(receiver.instructions[2].code == Code::agree, "all hosts agree before anything is stored");
  refused(across_hosts(1, 18, 2), 18, "a message's sender is 2");
  refused(across_hosts(1, 19, 1), 19, "a message's number is 1, allowed are 0 to 0");
  refused(across_hosts(1, 20, 2), 20, "a second ENTER");
  refused(across_hosts(0, 28, 0), 31, "a rank reads the messages that it receives, and stores to those that it sends");
  refused(across_hosts(0, 32, 0), 32, "ends before AGREE, though it crosses hosts");
}

void a_plan_enters_once_and_before_it_waits_publishes_or_ends() {
  refused(with_body({0}), 16, "ends before ENTER");
  refused(with_body({2, 2, 0}), 17, "a second ENTER");
  refused(with_body({3, 1, 1, 2, 0}), 16, "a WAIT before ENTER");
  refused(with_body({4, 1, 2, 0}), 16, "a PUBLISH before ENTER");
  expect(decode(with_body({2, 0})).instructions.size() == 2, "ENTER and END to be a plan");
}

void a_private_plan_may_not_touch_a_peers_input_or_output() {
  const size_t location = kReduceWord + 11;
  refused(with(location + 1, kInput), location + 3, "only the scratch of other ranks");
  refused(with(location + 1, kOutput), location + 3, "only the scratch of other ranks");
  Words open = with(location + 1, kInput);
  open[10] &= ~kPrivate;
  expect(!decode(open).is_private, "the same in a plan that is not private to be allowed");
}

void a_partial_result_lies_in_scratch_and_the_header_says_so() {
  const size_t mark = kReduceWord + 22;  // of the second destination, in scratch
  refused(with(mark, kPartial), mark, "a partial result may only lie in scratch");
  Words announced = with(mark, kPartial);
  announced[10] |= 8;
  expect(decode(announced).partials, "the same to be allowed where the header says so");
  announced[mark - 4] = kPartial;  // the first destination is the output
  refused(announced, mark - 4, "a partial result may only lie in scratch");
}

void pieces_cover_the_window_without_overlap() {
  for (uint64_t count : {0u, 1u, 15u, 16u, 17u, 100u, 1000u})
    for (uint64_t low : {0u, 16u, 64u})
      for (uint64_t high : {16u, 64u, 2000u})
        for (int32_t pieces : {1, 2, 3, 7}) {
          if (high < low) continue;
          uint64_t next = std::min(low, count);
          for (int32_t piece = 0; piece < pieces; ++piece) {
            const Piece p = piece_of(count, low, high, pieces, piece);
            expect(p.count == 0 || p.begin == next, "a piece to begin where the one before ended");
            next += p.count;
          }
          expect(next == std::max(std::min(low, count), std::min(high, count)), "the window to be covered");
        }
}

}  // namespace

int main() {
  return run({
      {"a plan is decoded field by field", a_plan_is_decoded_field_by_field},
      {"each header word is refused by its index", each_header_word_is_refused_by_its_index},
      {"each word of an instruction is refused by its index", each_word_of_an_instruction_is_refused_by_its_index},
      {"a plan cut short is refused where it ends", a_plan_cut_short_is_refused_where_it_ends},
      {"a plan across hosts sends, receives and agrees once", a_plan_across_hosts_sends_receives_and_agrees_once},
      {"a plan enters once, and before it waits, publishes or ends",
       a_plan_enters_once_and_before_it_waits_publishes_or_ends},
      {"a private plan may not touch a peer's input or output", a_private_plan_may_not_touch_a_peers_input_or_output},
      {"a partial result lies in scratch and the header says so",
       a_partial_result_lies_in_scratch_and_the_header_says_so},
      {"pieces cover the window without overlap", pieces_cover_the_window_without_overlap},
  });
}
