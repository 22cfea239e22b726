// What was found, with the shortest way to each violation.
#pragma once

#include "liveness.hpp"

inline string describe_task(const View& view, int task) {
  string text = string(" ") + TASK_NAMES[task] + "[";
  if (view.queued[task])
    text += "queue" + (view.queued[task] > 1 ? "x" + std::to_string(view.queued[task]) : string()) + " ";
  if (view.in_intake[task]) text += "intake ";
  if (view.scheduled[task]) text += view.scheduled[task] == IS_DUE ? "scheduled(due) " : "scheduled ";
  for (const auto& claim : view.claims)
    if (claim.task == task)
      text += "inflight " + worker_id(claim.worker, claim.incarnation) + "#" + std::to_string(claim.number) +
              (claim.started ? "* " : " ");
  if (view.letter[task]) text += "letter(run " + std::to_string(view.letter_run[task]) + ") ";
  text += string("meta=") + META_NAMES[view.meta[task]];
  if (view.marked[task]) text += " marked";
  if (view.attempts[task] || view.losses[task])
    text += " attempts=" + std::to_string(view.attempts[task]) + " crashes=" + std::to_string(view.crashes[task]) +
            " losses=" + std::to_string(view.losses[task]) + " shared=" + std::to_string(view.shared[task]);
  return text + "]";
}

inline string describe_worker(const State& state, const View& view, int number) {
  const Worker& worker = state.workers[number];
  string text = " " + worker_id(number, worker.incarnation);
  if (worker.life != ALIVE) text += worker.life == DEAD ? "(dead)" : "(left)";
  if (!view.has_lease(number, worker.incarnation)) text += "(no lease)";
  if (worker.alone) text += worker.alone == HOLDS_ALONE ? "(alone)" : "(gives alone back)";
  if (!worker.has_endpoint) text += "(endpoint away)";
  text += "{";
  for (const auto& held : worker.held) {
    if (held.place == NOWHERE) continue;
    text += string(TASK_NAMES[held.task]) + "#" + std::to_string(held.number) + ":" + PLACE_NAMES[held.place];
    if (held.ending) text += string("=") + ENDING_NAMES[held.ending];
    if (held.place == PENDING && held.second_ending) text += string("+") + ENDING_NAMES[held.second_ending];
    text += " ";
  }
  return text + "}";
}

inline string describe(const State& state) {
  const View& view = view_of(state);
  string text;
  for (int task = 0; task < TASKS; task++)
    if (state.accepted[task] || places(view, task) || view.meta[task] || view.letter[task])
      text += describe_task(view, task);
  for (int worker = 0; worker < WORKERS; worker++) text += describe_worker(state, view, worker);
  if (view.alone) text += " alone=" + worker_id(view.alone - 1, view.alone_incarnation);
  static const char* const ANSWERS[] = {
      "", " cancel:asked", " cancel:True", " cancel:False", " cancel:UnknownTask", " revoked", ""};
  for (uint8_t answer : state.cancel) text += ANSWERS[answer];
  return text;
}

inline void tell_step(const string& action, const State& state) {
  printf("      %-66s%s\n", action.c_str(), describe(state).c_str());
}

inline void tell_way(const Search& search, vector<Action> actions) {
  State state = search.first();
  tell_step("", state);
  monitors.is_quiet = true;
  for (const auto& action : actions) {
    bool found = false;
    State next = state;
    all_steps(state, [&](const Action& possible, State& after, int) {
      if (!found && !memcmp(&action, &possible, sizeof action)) next = after, found = true;
    });
    tell_step(found ? action_text(action) : "? " + action_text(action), next);
    if (!found) break;
    state = next;
  }
  monitors.is_quiet = false;
}

inline void tell_cycle(const Search& search, const Liveness& liveness) {
  printf("      ... and round:\n");
  std::set<int> visited;
  int at = liveness.fair_cycle, component = liveness.component_of[at];
  for (int steps = 0; steps < 14; steps++) {
    int next = -1;
    for (const auto& edge : search.edges[at])
      if (next < 0 && liveness.component_of[edge.to] == component && !visited.count(edge.to)) {
        next = edge.to;
        tell_step("process " + std::to_string(edge.process), search.kept[next]);
      }
    if (next < 0) return;
    visited.insert(next);
    at = next;
  }
}

inline void report(const string& name, const Search& search) {
  printf("%s: %zu states%s, %llu transitions, %zu keyspaces, %zu calls, %llu script runs, %.0f s\n", name.c_str(),
         search.states(), search.is_cut ? " (cut: bounded)" : " (complete)",
         static_cast<unsigned long long>(search.transitions), broker->keyspaces.size(), broker->calls(),
         static_cast<unsigned long long>(broker->runs()), search.took_s);
  for (const auto& [property, violation] : std::map<string, Violation>(monitors.found)) {
    printf("  VIOLATION %s (%llu transitions)\n", property.c_str(), static_cast<unsigned long long>(violation.count));
    vector<Action> actions = search.way_to(violation.at);
    actions.push_back(violation.action);
    tell_way(search, actions);
  }
  if (search.dead_end >= 0) {
    printf("  DEAD END, not the goal (%llu)\n", static_cast<unsigned long long>(search.dead_ends));
    tell_way(search, search.way_to(search.dead_end));
  }
  if (!scene.live || search.is_cut || (scene.stop && !monitors.found.empty())) return;
  Liveness liveness = look_for_liveness(search);
  printf("  liveness: %d components, %d final ones, %d of them without the goal\n", liveness.components,
         liveness.final_ones, liveness.without_goal);
  if (liveness.stuck >= 0) {
    printf("  STUCK: from here, without further faults, the goal is never reached\n");
    tell_way(search, search.way_to(liveness.stuck));
  }
  printf("  weakly fair cycles without the goal: %d components\n", liveness.fair_cycles);
  if (liveness.fair_cycle >= 0) {
    tell_way(search, search.way_to(liveness.fair_cycle));
    tell_cycle(search, liveness);
  }
}
