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
if call('EXISTS', KEYS[1]) == 0 then
  return redis.error_reply('NOLEASE the lease of this worker has lapsed')
end
if not (may('HSET', KEYS[2], 'field', '') and may('HDEL', KEYS[2], 'field') and may('LTRIM', KEYS[5], 0, -1)) then
  return denied({{'HSET', KEYS[2], 'field', ''}, {'HDEL', KEYS[2], 'field'}, {'LTRIM', KEYS[5], 0, -1}})
end
call('HLEN', KEYS[2])
local left, bytes_left, largest = tonumber(ARGV[1]), math.min(tonumber(ARGV[2]), CALL_BYTES), tonumber(ARGV[3])
local number = tonumber(ARGV[4])
local some_tried = call('EXISTS', KEYS[3])
local form = some_tried == 1 and '%d:%s' or '%d!:%s'
local reply, n = {some_tried + 2 * call('EXISTS', KEYS[4])}, 1
local lists = #KEYS - 4
local empty, room, seen = {}, {}, {}
for i = 5 + 2 * lists, #ARGV do
  room[#room + 1] = tonumber(ARGV[i])
end
begin_to_write(KEYS[2])
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
    call('HSET', KEYS[2], unpack(fields))
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
