-- claim: move messages from queue lists into a worker's in-flight hash.
-- With: pages
-- KEYS  1 worker:<wid>   2 worker:<wid>:inflight   3 tried   4 cancelled:lately   5.. lists, in the order of service
-- ARGV  1 most messages   2 stop after so many bytes, or after a message that is not returned whole
--       3 largest message that is returned whole
--       4 number of the first claim   5.. for each list: how many it gives before the first gives more, and the
--       number of its group; then for each group, from 1, how many its lists give together
-- Returns 1 if there are tasks that were tried before, plus 2 if some were cancelled lately, plus 4 if it was the bytes
-- that ended the claim; then field, size, message, field, size, message, …: of a message over ARGV[3] only the last
-- 16 KB, which hold a kombu message's headers.
-- A field is "<number>:<list>", or "<number>!:<list>" where no task was tried before: then it may be started at once,
-- and who has to be alone waits for it (`alone.lua`).
local lease_key, inflight_key, tried_key, lately_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local messages_max, bytes_max, whole_max, first_number = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if call('EXISTS', lease_key) == 0 then
  return redis.error_reply('NOLEASE the lease of this worker has lapsed')
end
local first_list = KEYS[5]
if not (may('HSET', inflight_key, 'field', '') and may('HDEL', inflight_key, 'field')
  and may('LTRIM', first_list, 0, -1)) then
  return denied({
    {'HSET', inflight_key, 'field', ''}, {'HDEL', inflight_key, 'field'}, {'LTRIM', first_list, 0, -1}})
end
call('HLEN', inflight_key)
local left, bytes_left, largest = tonumber(messages_max), math.min(tonumber(bytes_max), CALL_BYTES), tonumber(whole_max)
local number = tonumber(first_number)
local some_tried = call('EXISTS', tried_key)
local form = some_tried == 1 and '%d:%s' or '%d!:%s'
local reply, n = {some_tried + 2 * call('EXISTS', lately_key)}, 1
local lists = #KEYS - 4 -- those from KEYS[5] on; what is said of each stands from ARGV[5] on
local empty, room, seen = {}, {}, {}
for i = 5 + 2 * lists, #ARGV do
  room[#room + 1] = tonumber(ARGV[i])
end
begin_to_write(inflight_key)
local function take(key, most, group)
  local name = string.sub(key, #CELERY + 1)
  seen[key] = seen[key] or nothing()
  while most > 0 and left > 0 and bytes_left > 0 and room[group] > 0 and not empty[key] do
    local asked = math.min(most, left, room[group], next_page(seen[key]))
    local page = try('LRANGE', key, -asked, -1)
    local found = page.err and 0 or #page -- a key that is no list gives nothing
    empty[key] = found < asked
    note_page(seen[key], found > 0 and page or {})
    local taken, fields = 0, {}
    while taken < found and bytes_left > 0 do
      local message = page[found - taken] -- the oldest stands at the right
      local field = string.format(form, number, name)
      local size = #message
      fields[2 * taken + 1], fields[2 * taken + 2] = field, message
      bytes_left = bytes_left - size
      if size > largest then
        message = string.sub(message, -16384)
        bytes_left = 0
      end
      reply[n + 1], reply[n + 2], reply[n + 3] = field, size, message
      n, number, taken = n + 3, number + 1, taken + 1
    end
    if taken == 0 then
      return
    end
    call('HSET', inflight_key, unpack(fields))
    call('LTRIM', key, 0, -taken - 1)
    left, most, room[group] = left - taken, most - taken, room[group] - taken
  end
end
for i = 1, lists do
  take(KEYS[i + 4], tonumber(ARGV[2 * i + 3]), tonumber(ARGV[2 * i + 4]))
end
for i = 1, lists do -- what others left unused
  take(KEYS[i + 4], left, tonumber(ARGV[2 * i + 4]))
end
reply[1] = reply[1] + (bytes_left > 0 and 0 or 4)
return reply
