// What actors have in common: a step is an action, the state after it, and whose step it was.
#pragma once

#include <algorithm>

#include "monitors.hpp"

// Processes, for fairness: of a worker its slots and its chores, then the client and the rest of the world.
constexpr int FAULT_STEP = -1, PER_WORKER = 12, CLAIMS = 6, ALONE_KEEPER = 7, CHORES = 8, REAPER = 9;
constexpr int SUPERVISOR = 29, CLIENT = 30, WORLD = 31;

using Emit = std::function<void(const Action&, State&, int process)>;

// Equal states in one form: the order of a worker's slots says nothing, and who is dead holds nothing.
inline void normalise(State& state) {
  for (auto& worker : state.workers) {
    for (auto& held : worker.held)
      if (held.place == NOWHERE) memset(&held, 0, sizeof held);
    std::sort(worker.held, worker.held + HELD,
              [](const Held& a, const Held& b) { return memcmp(&a, &b, sizeof a) > 0; });
    if (worker.life == ALIVE) continue;
    memset(worker.held, 0, sizeof worker.held);
    worker.seeks = worker.must_adopt = worker.some_tried = worker.some_cancelled = 0;
    worker.alone = worker.hold = worker.leaving = 0;
  }
}

class Stepper {
 public:
  Stepper(const State& state, const Emit& emit) : state(state), view(view_of(state)), emit_(emit) {}

  const State& state;
  const View& view;

  // Begin a step; whatever is found wrong until `done` is told of this action.
  State begin(ActionCode code, int worker = 0, int which = 0, int detail = 0, HowLost lost = NOT_LOST) const {
    monitors.action = {code, static_cast<uint8_t>(worker), static_cast<uint8_t>(which), static_cast<uint8_t>(detail),
                       lost};
    return state;
  }

  void done(State after, int process) const {
    Action action = monitors.action;
    normalise(after);
    check_state(after);
    emit_(action, after, process);
  }

  // A call and, as faults, the same with a reply that is lost and with a caller that gives it up: then it is carried
  // out at some later time. `numbers`: bits of the claims' numbers that it names.
  template <typename OnError>
  void may_be_lost(ActionCode code, int worker, int which, int detail, const Call& call, int numbers,
                   OnError on_error) const {
    if (state.budget[LOST]) {
      State after = begin(code, worker, which, detail, REPLY_LOST);
      after.budget[LOST]--;
      perform(after, call);
      on_error(after);
      done(after, FAULT_STEP);
    }
    if (state.budget[LATE_CALL] && state.late_call < 0) {
      State after = begin(code, worker, which, detail, CARRIED_OUT_LATE);
      after.budget[LATE_CALL]--;
      after.late_call = broker->number_of(call);
      after.late_worker = worker;
      after.late_numbers = numbers;
      on_error(after);
      done(after, FAULT_STEP);
    }
  }

  void may_be_lost(ActionCode code, int worker, int which, int detail, const Call& call, int numbers = 0) const {
    may_be_lost(code, worker, which, detail, call, numbers, [](State&) {});
  }

 private:
  const Emit& emit_;
};
