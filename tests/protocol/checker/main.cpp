// An explicit-state checker of Samphire's task protocol. The broker's transitions are the real Lua scripts, run on a
// keyspace in memory and remembered; lanes, clients and faults are modelled by hand, one atomic step for each call of
// the broker or decision.
//   checker root=<checkout> name=<of the run> [<setting>=<number> …]      settings and faults: scene.hpp
#include "report.hpp"

namespace {

void set(State& first, const string& name, int value) {
  auto setting = SCENE_SETTINGS.find(name);
  if (setting != SCENE_SETTINGS.end()) {
    scene.*(setting->second) = value;
    return;
  }
  for (int fault = 0; fault < FAULTS; fault++)
    if (name == FAULT_NAMES[fault]) {
      first.budget[fault] = static_cast<uint8_t>(value);
      return;
    }
  fprintf(stderr, "no such setting: %s\n", name.c_str());
  exit(2);
}

void queue_others(State& first, Keyspace& keys) {  // as submits of the SDK leave them
  for (int task = 1; task < scene.tasks; task++) {
    if (scene.chain && task == 1) continue;
    keys["inference.m"].type = Type::list;
    keys["inference.m"].list.push_front(message_of(task));
    keys["sub:queues"].type = Type::set;
    keys["sub:queues"].set.insert("inference.m");
    first.accepted[task] = 1;
    first.waits[task] = WAITING;
  }
}

// ta and tb were there when what is everybody's went down twice; tc when only workers did.
void remember_crashes(State& first, Keyspace& keys) {
  for (int task = 0; task < 3; task++) {
    if (!(task == 0 ? scene.prealone : scene.prealone & 1 << task)) continue;
    Value& hash = keys[string("task:") + TASK_NAMES[task]];
    hash.type = Type::hash;
    hash.hash = {{"attempts", "2"}, {"crashes", "2"}, {"history", "y"}};
    if (task < 2) hash.hash["shared"] = "1";
    keys["tried"].type = Type::set;
    keys["tried"].set.insert(TASK_NAMES[task]);
    first.starts[task] = 2;
  }
}

}  // namespace

int main(int count, char** arguments) {
  State first;
  memset(&first, 0, sizeof first);
  first.checkpoint = first.late_call = -1;
  string name = "run", root = ".";
  for (int n = 1; n < count; n++) {
    string argument = arguments[n];
    size_t equals = argument.find('=');
    string setting = argument.substr(0, equals), value = equals == string::npos ? "" : argument.substr(equals + 1);
    if (setting == "name")
      name = value;
    else if (setting == "root")
      root = value;
    else
      set(first, setting, atoi(value.c_str()));
  }
  first.budget[CHECKPOINT] = first.budget[ROLLBACK];
  Broker real(root, scene.dump, name + ".jsonl");
  broker = &real;
  Keyspace keys;
  queue_others(first, keys);
  remember_crashes(first, keys);
  for (auto& worker : first.workers) worker.has_endpoint = worker.must_adopt = 1;
  first.broker = broker->keyspaces.number_of(keys);
  monitors.is_quiet = true;
  for (int worker = 0; worker < WORKERS; worker++) perform(first, call_beat(worker, 0));
  if (scene.follow) perform(first, call_edit({"RPUSH\tsub:follows\tta"}));
  monitors.is_quiet = false;
  normalise(first);
  Search search(first, name);
  search.run();
  report(name, search);
  return 0;
}
