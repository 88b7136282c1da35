"use strict";
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
// One control for the three videos of a clip. The first video leads, the others follow within a frame.
for (const clip of document.querySelectorAll(".clip")) {
  const videos = [...clip.querySelectorAll("video")];
  const lead = videos[0];
  const button = clip.querySelector(".play");
  const slider = clip.querySelector("input");
  const speed = clip.querySelector("select");
  const frame = 1 / Number(clip.dataset.fps);
  for (const video of videos) {
    // Some browsers play data addresses only as blobs.
    const bytes = Uint8Array.from(atob(video.src.slice(video.src.indexOf(",") + 1)), (c) => c.charCodeAt(0));
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  }
  const follow = () => {
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - lead.currentTime) > frame / 2) video.currentTime = lead.currentTime;
    }
  };
  const seek = (time) => {
    const last = Math.max(0, (lead.duration || 0) - frame / 2);
    for (const video of videos) video.currentTime = Math.min(Math.max(0, time), last);
  };
  const pause = () => {
    for (const video of videos) video.pause();
    button.textContent = "Play";
    follow();
  };
  const play = () => {
    if (lead.ended || lead.currentTime >= lead.duration - frame) seek(0);
    for (const video of videos) video.play();
    button.textContent = "Pause";
  };
  button.addEventListener("click", () => (lead.paused ? play() : pause()));
  clip.querySelector(".back").addEventListener("click", () => { pause(); seek(lead.currentTime - frame); });
  clip.querySelector(".next").addEventListener("click", () => { pause(); seek(lead.currentTime + frame); });
  slider.addEventListener("input", () => { pause(); seek((slider.value / 1000) * lead.duration); });
  speed.addEventListener("change", () => { for (const video of videos) video.playbackRate = Number(speed.value); });
  lead.addEventListener("ended", () => { seek(0); play(); });
  const show = () => {
    if (lead.duration) slider.value = Math.round((1000 * lead.currentTime) / lead.duration);
  };
  lead.addEventListener("seeked", show);
  const tick = () => {
    if (!lead.paused) { follow(); show(); }
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
  clip.querySelector(".controls").hidden = false;
}
